"""The list of arguments that a run prints."""

from argparse import Namespace

WIDTH = 48


def print_args(args: Namespace) -> None:
    """Print every argument, sorted without regard to case, names and values joined by dots."""
    print(format_args(args), flush=True)


def format_args(args: Namespace) -> str:
    """The text of :func:`print_args`."""
    lines = [
        f"  {name} {'.' * (WIDTH - len(name))} {value}"
        for name, value in vars(args).items()
        if name != "given_flags"
    ]
    header = "-" * 24 + " arguments " + "-" * 24
    footer = "-" * 20 + " end of arguments " + "-" * 21
    return "\n".join([header, *sorted(lines, key=str.lower), footer])
