"""``python -m tests.npu.virtual -- COMMAND``: runs a command on virtual NPUs."""

import argparse
import os
import sys

from tests.npu.cann_stub.build import why_not
from tests.npu.virtual.environment import CHIPS, environment


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.npu.virtual",
        description="Runs COMMAND, and all that it starts, on a machine with virtual Ascend NPUs.",
    )
    parser.add_argument("--devices", type=int, default=2, help="number of NPUs (default: 2)")
    parser.add_argument(
        "--soc",
        default="Ascend910B2",
        choices=CHIPS,
        metavar="NAME",
        help=f"the chip, one of {', '.join(CHIPS)} (default: Ascend910B2)",
    )
    parser.add_argument("--memory", type=float, default=64, metavar="GIB", help="of each NPU (default: 64)")
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="what to run, after --")
    return parser


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    if options.devices < 1:
        parser.error(f"--devices {options.devices}: at least one is needed")
    reason = why_not()
    if reason is not None:
        sys.exit(f"error: no virtual NPU here: {reason}")
    variables = environment(options.devices, options.soc, options.memory)
    os.environ["PATH"] = variables["PATH"]
    try:
        os.execvpe(options.command[0], options.command, variables)
    except OSError as error:
        sys.exit(f"error: {options.command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
