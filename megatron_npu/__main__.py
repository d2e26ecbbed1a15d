"""``python -m megatron_npu``: the table of replacements; ``python -m megatron_npu check``: their errors."""

import argparse
import os
import sys

import megatron_npu
from megatron.core.errors import MegatronError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_npu", description=megatron_npu.__doc__)
    commands = parser.add_subparsers(dest="command", metavar="check")
    check = commands.add_parser("check", help="compare every replacement with its default on this device")
    check.add_argument("--point", action="append", help="only this one (last part of its name); repeatable")
    check.add_argument(
        "--dtype",
        action="append",
        choices=("float32", "float16", "bfloat16"),
        help="only this type; repeatable",
    )
    words = parser.parse_args(argv)
    # torch_npu is imported here, after a look at CANN; by torch itself it would end in a traceback without.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        return _check(words.point, words.dtype) if words.command == "check" else _table()
    except MegatronError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


def _table() -> int:
    from megatron_npu import activation, versions

    if versions.why_no_npu() is None:
        megatron_npu.activate()
    print(activation.device_line())
    rows = activation.table()
    header = ("point", "replacement", "operators", "chips", "state")
    cells = [(row.point, row.serves, row.operators, row.chips, row.reason) for row in rows]
    widths = [max(len(row[i]) for row in (header, *cells)) for i in range(len(header) - 1)]
    for row in (header, *cells):
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1], sep="  "
        )
    print(f"{sum(row.active for row in rows)} of {len(rows)} points are replaced")
    return 0


def _check(points: list[str] | None, dtypes: list[str] | None) -> int:
    from megatron.core import accelerator
    from megatron_npu import versions
    from megatron_npu.checking import compare

    reason = versions.why_no_npu()
    if reason is not None:
        raise compare.NothingToCheckError(reason)
    megatron_npu.activate()
    with compare.process_group():
        return compare.main(accelerator.current_device(), points, dtypes)


if __name__ == "__main__":
    sys.exit(main())
