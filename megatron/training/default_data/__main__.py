"""``python -m megatron.training.default_data``: make the default data set, print where it is."""

import argparse
import shlex
from pathlib import Path

from megatron.training.default_data.recipe import ensure_default_data
from megatron.training.entry import run_main
from megatron.training.processes import stop_signals


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m megatron.training.default_data", description=__doc__)
    parser.add_argument("--cache-dir", type=Path, help="instead of $MEGATRON_CACHE or ~/.cache/megatron-npu")
    root = parser.parse_args().cache_dir
    if signals := stop_signals.installed():
        signals.describe = lambda: "before the default data set was finished"
    data = ensure_default_data(root.absolute() if root else None)
    for name in ("data_path", "vocab_file", "merge_file"):
        print(f"{name.upper()}={shlex.quote(str(getattr(data, name)))}")


if __name__ == "__main__":
    run_main(main)
