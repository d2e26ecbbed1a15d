"""A command-line flag as a value, so that the flags are tables that can be read, counted and tested."""

import argparse
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        names: its spellings, the documented one first.
        dest: name of the attribute that holds its value.
        options: keyword arguments of ``ArgumentParser.add_argument``.
    """

    names: tuple[str, ...]
    dest: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def default(self) -> Any:
        """The value when the flag is not given; a list is a new one every time."""
        default = self.options["default"]
        return default() if callable(default) else copy(default)

    def words(self, value: Any) -> str:
        """What to type so that the argument gets ``value``: the flag with it, or to leave the flag out."""
        action = self.options.get("action")
        if value is None or value == self.default or (action and value == (action == "store_false")):
            return f"no {self.name}"
        if action:
            return self.name
        values = value if isinstance(value, (list, tuple)) else [value]
        return " ".join([self.name, *(str(getattr(item, "name", item)) for item in values)])

    def add_to(self, parser: Any) -> None:
        """Add the flag to a parser or an argument group."""
        parser.add_argument(*self.names, dest=self.dest, **{**self.options, "default": self.default})


@dataclass(frozen=True)
class Group:
    """Flags that belong together, under the title that ``--help`` prints."""

    title: str
    flags: tuple[Flag, ...]

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        section = parser.add_argument_group(title=self.title)
        for flag in self.flags:
            flag.add_to(section)


def value(
    *names: str,
    type: Callable[[str], Any] | None = None,
    default: Any = None,
    choices: Iterable[Any] | None = None,
    nargs: str | None = None,
    dest: str | None = None,
    metavar: str | None = None,
    help: str = "",
) -> Flag:
    """A flag with a value; text when no type is given, and a ``default`` may be a function to call."""
    options: dict[str, Any] = {"default": default, "help": help}
    choices = None if choices is None else list(choices)
    optional = {"type": type, "choices": choices, "nargs": nargs, "metavar": metavar}
    options.update({key: entry for key, entry in optional.items() if entry is not None})
    return Flag(names, dest or _dest(names[0]), options)


def switch(*names: str, dest: str | None = None, default: bool | None = False, help: str = "") -> Flag:
    """A flag that turns something on."""
    return Flag(names, dest or _dest(names[0]), {"action": "store_true", "default": default, "help": help})


def off_switch(name: str, dest: str, help: str = "") -> Flag:
    """A flag that turns off what ``dest`` says, which is on by default."""
    return Flag((name,), dest, {"action": "store_false", "default": True, "help": help})


def _dest(name: str) -> str:
    return name.lstrip("-").replace("-", "_")
