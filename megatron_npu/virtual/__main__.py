"""``python -m megatron_npu.virtual -- COMMAND``: runs a command on virtual NPUs."""

import argparse
import os
import signal
import sys

from megatron.core.errors import ConfigError
from megatron_npu.virtual import cann
from megatron_npu.virtual.environment import CHIPS, environment


def make_parser() -> argparse.ArgumentParser:
    """The options of this command."""
    as_module = sys.argv[0].endswith("__main__.py")  # else megatron-npu, which shows its own name
    parser = argparse.ArgumentParser(
        prog="python -m megatron_npu.virtual" if as_module else None,
        usage="%(prog)s [--devices N] [--soc NAME] [--memory GIB] -- COMMAND [WORD ...]",
        description="Runs COMMAND, and all that it starts, on a machine with virtual Ascend NPUs.",
    )
    parser.add_argument("--devices", type=int, default=2, metavar="N", help="number of NPUs (default: 2)")
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


def main(argv: list[str] | None = None) -> int:
    """Becomes the command.

    Returns:
        The exit status, where there is no command to become.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.devices < 1:
        parser.error(f"--devices {options.devices}: at least one is needed")
    if options.memory <= 0:
        parser.error(f"--memory {options.memory:g}: a positive number is needed")
    try:
        reason = cann.why_not()
        if reason is not None:
            raise ConfigError(reason)
        variables = environment(options.devices, options.soc, options.memory)
    except ConfigError as error:
        print(f"error: no virtual NPU here: {error}", file=sys.stderr)
        return error.exit_status
    return _become(options.command, variables)


def _become(command: list[str], variables: dict[str, str]) -> int:
    os.environ["PATH"] = variables["PATH"]
    # Python ignores it, and what it starts would go on after the reader of its output has left.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, variables)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
