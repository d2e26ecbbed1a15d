"""``python -m megatron.training.default_data``: make the default data set, print where it is."""

import argparse
import shlex
import sys
from pathlib import Path

from megatron.core.errors import MegatronError
from megatron.training.default_data.recipe import ensure_default_data
from megatron.training.output_streams import tolerate_failing_streams


def main() -> int:
    tolerate_failing_streams()
    parser = argparse.ArgumentParser(prog="python -m megatron.training.default_data", description=__doc__)
    parser.add_argument("--cache-dir", type=Path, help="instead of $MEGATRON_CACHE or ~/.cache/megatron-npu")
    root = parser.parse_args().cache_dir
    try:
        data = ensure_default_data(root.absolute() if root else None)
    except MegatronError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_status
    for name in ("data_path", "vocab_file", "merge_file"):
        print(f"{name.upper()}={shlex.quote(str(getattr(data, name)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
