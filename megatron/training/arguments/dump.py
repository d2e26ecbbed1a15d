"""The list of arguments that a run prints."""

from argparse import Namespace
from collections.abc import Collection
from enum import Enum
from typing import Any

from megatron.training.arguments.flags import ALL_FLAGS

WIDTH = 48
# By their texts, because tools that need no torch read the flags too.
_DTYPE_WORDS = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
COLUMNS = 110
HEADER = "-" * 24 + " arguments " + "-" * 24
FOOTER = "-" * 20 + " end of arguments " + "-" * 21


def print_args(args: Namespace, given: Collection[str] | None = None) -> None:
    """Print the arguments as ``--log-arguments`` asks: those that were changed, all of them, or none.

    Args:
        args: checked arguments.
        given: flags of the command line, where that is known; see :func:`changed_args`.
    """
    which = getattr(args, "log_arguments", "all")
    if which == "changed":
        print(format_changed_args(args, given), flush=True)
    elif which == "all":
        print(format_args(args), flush=True)


def format_args(args: Namespace) -> str:
    """Every argument, sorted without regard to case, one a line, names and values joined by dots."""
    lines = [f"  {name} {'.' * (WIDTH - len(name))} {value}" for name, value in vars(args).items()]
    return "\n".join([HEADER, *sorted(lines, key=str.lower), FOOTER])


def format_changed_args(args: Namespace, given: Collection[str] | None = None) -> str:
    """The arguments whose values differ from the defaults of their flags, several a line."""
    changed = changed_args(args, given)
    words = [f"{name}={_text(value)}" for name, value in changed.items()]
    others = len(vars(args)) - len(changed)
    note = f"  {others} others have their defaults or follow from these: --log-arguments all prints them"
    return "\n".join([HEADER, *_lines_of(words), note, FOOTER])


def _lines_of(words: list[str]) -> list[str]:
    """``words`` in lines of at most ``COLUMNS`` characters where they are short enough."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(word) + 2 <= COLUMNS:
            lines[-1] += f"  {word}"
        else:
            lines.append(f"  {word}")
    return lines


def changed_args(args: Namespace, given: Collection[str] | None = None) -> dict[str, Any]:
    """Value by name of the arguments that differ from the defaults of their flags, in alphabetical order.

    Args:
        args: checked arguments.
        given: flags of the command line. An argument without a default, such as ``ffn_hidden_size``, is
            listed only where its flag is among them: what a run works out by itself is no change. None
            lists it wherever it has a value.
    """
    defaults = {flag.dest: flag.default for flag in ALL_FLAGS}
    dests = None if given is None else {flag.dest for flag in ALL_FLAGS if set(flag.names) & set(given)}
    changed = {}
    for name, value in sorted(vars(args).items(), key=lambda item: item[0].lower()):
        if name not in defaults or _text(value) == _text(defaults[name]):
            continue
        if defaults[name] is not None or dests is None or name in dests:
            changed[name] = value
    return changed


def _text(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return ",".join(_text(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}"
    return _DTYPE_WORDS.get(str(value), str(value))
