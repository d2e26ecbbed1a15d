"""A command-line flag as one row that says everything about it.

From the rows come the parser, ``--help``, ``docs/flags.md`` and what ``checks`` looks at.  A new flag is a
row in the file of its section under ``flags/``, and the code that reads its argument.
"""

import argparse
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

Predicate = Callable[[Namespace], object]
# Numbers travel between ranks, and into files, in 64 bits.
MOST = 2**63 - 1


@dataclass(frozen=True)
class Notice:
    """The flag works; giving it prints a line that says how."""

    text: str


@dataclass(frozen=True)
class Alias(Notice):
    """The flag is another name for other flags, which the line names."""


@dataclass(frozen=True)
class Accepted(Notice):
    """The flag parses, so that launch scripts run unchanged, and changes nothing: the line says why.

    Its argument never reaches a config.
    """


@dataclass(frozen=True)
class Refused:
    """The flag parses and stops the run.

    Attributes:
        reason: why.
        remedy: what to do instead.
        values: those that are refused, where the flag works with others.
    """

    reason: str
    remedy: str = "leave it out"
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Withdrawn(Refused):
    """The flag is an old name that is refused; its argument leaves the namespace once that is said."""


@dataclass(frozen=True)
class NotBuilt:
    """The flag asks for a feature that does not exist yet, and stops the run; building it deletes this.

    Attributes:
        feature: what it asks for, as a noun phrase.
        remedy: what to do instead.
        asks: whether a value asks for the feature, where the flag works with others; by default every value
            but the flag's own default does.
    """

    feature: str
    remedy: str = "leave it out"
    asks: Callable[[Any], bool] | None = None


Status = Notice | Refused | NotBuilt


@dataclass(frozen=True)
class Bounds:
    """A range for numbers; ``open_low`` and ``open_high`` leave the end out."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, number: float) -> bool:
        above_low = number > self.low if self.open_low else number >= self.low
        below_high = number < self.high if self.open_high else number <= self.high
        return math.isfinite(number) and above_low and below_high

    def example(self) -> float:
        """A number in the range."""
        if self.high > 1:
            return int(self.low) + 1 if self.open_low else int(self.low)
        return (self.low + self.high) / 2

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"


def at_least(low: float) -> Bounds:
    """``low`` or more."""
    return Bounds(low)


def above(low: float, high: float = math.inf) -> Bounds:
    """More than ``low``, and ``high`` at most."""
    return Bounds(low, high, open_low=True)


def between(low: float, high: float) -> Bounds:
    """From ``low`` to ``high``, both included."""
    return Bounds(low, high)


def fraction_below(high: float) -> Bounds:
    """From 0 to less than ``high``."""
    return Bounds(0, high, open_high=True)


@dataclass(frozen=True)
class Need:
    """What must hold of the completed arguments for a flag to be given.

    Attributes:
        words: names it in the message.
        met: whether it holds.
        remedy: what to do where it does not.
    """

    words: str
    met: Predicate
    remedy: str


def need(words: str, met: Predicate | None = None, remedy: str | None = None) -> Need:
    """The run is refused where ``words``, such as ``--optimizer sgd``, do not go with the flag."""
    return Need(words, met or is_given(words), remedy or f"add {words}, or leave it out")


@dataclass(frozen=True)
class Opponent:
    """Another flag that cannot be given with this one."""

    name: str
    remedy: str = "keep one of them"


@dataclass(frozen=True)
class NoEffect:
    """A working flag changes nothing, and a warning says so, unless ``acts`` holds.

    Attributes:
        acts: whether it changes anything, of the completed arguments.
        reason: the end of the sentence that begins with "has no effect".
    """

    acts: Predicate
    reason: str


def without(words: str, acts: Predicate | None = None) -> NoEffect:
    """No effect without ``words``, such as ``--optimizer sgd``; other words need ``acts`` to say when."""
    return NoEffect(acts or is_given(words), f" without {words}")


def unless(acts: Predicate, because: str) -> NoEffect:
    """No effect unless ``acts`` holds, because of what ``because`` says."""
    return NoEffect(acts, f": {because}")


def never(args: Namespace) -> bool:
    """The condition of a flag that has no effect in any company."""
    return False


def always(because: str) -> NoEffect:
    """No effect, whatever the flag comes with."""
    return unless(never, because)


def is_given(words: str) -> Predicate:
    """Whether the arguments are as ``words`` ask: a flag that is on, or a flag and its value."""
    name, _, wanted = words.partition(" ")
    dest = _dest(name)
    if wanted:
        return lambda args: str(getattr(args, dest)) == wanted
    return lambda args: getattr(args, dest) not in (None, "") and getattr(args, dest) is not False


@dataclass(frozen=True)
class Saving:
    """Memory that a flag would save, were it built.

    Attributes:
        what: whose memory.
        estimate: bytes on one rank, of the completed arguments.
    """

    what: str
    estimate: Callable[[Namespace], float]


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        names: its spellings, the documented one first.
        dest: name of the attribute that holds its value.
        options: keyword arguments of ``ArgumentParser.add_argument``.
        status: what it is, or its values are, instead of simply working.
        bounds: range of its number.
        most: the largest value; beyond it nothing could be built, and counting would not end.
        needs: what it is refused without.
        opponents: what it is refused with.
        no_effect: when it changes nothing; the first that applies is told.
        saving: what an accepted memory saver does not save.
        read: when its argument is first read, where that is after set-up or before it is recorded; not to
            have been read by the end of set-up then says nothing.
        read_as: the name that is read so late, if it is not ``dest``: a config field.
        added: the table of the original's flags, ``tests/golden/cli/cli_flags.tsv``, lacks it.
    """

    names: tuple[str, ...]
    dest: str
    options: dict[str, Any] = field(default_factory=dict)
    status: tuple[Status, ...] = ()
    bounds: Bounds | None = None
    most: int = MOST
    needs: tuple[Need, ...] = ()
    opponents: tuple[Opponent, ...] = ()
    no_effect: tuple[NoEffect, ...] = ()
    saving: Saving | None = None
    read: str = ""
    read_as: str = ""
    added: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def notice(self) -> Notice | None:
        """What giving the flag prints."""
        return next((entry for entry in self.status if isinstance(entry, Notice)), None)

    @property
    def refusal(self) -> Refused | None:
        """Why the flag is refused, whatever its value."""
        return next((entry for entry in self.status if isinstance(entry, Refused) and not entry.values), None)

    @property
    def not_built(self) -> NotBuilt | None:
        """The missing feature that the flag, or some of its values, ask for."""
        return next((entry for entry in self.status if isinstance(entry, NotBuilt)), None)

    @property
    def is_inert(self) -> bool:
        """Whether the flag changes nothing by its nature."""
        return isinstance(self.notice, Accepted)

    @property
    def is_plain(self) -> bool:
        """Whether the flag neither prints a notice nor is refused as such."""
        return self.notice is None and self.refusal is None

    @property
    def works(self) -> bool:
        """Whether the flag is plain, and some of its values at least do not ask for a missing feature."""
        return self.is_plain and (self.not_built is None or self.not_built.asks is not None)

    @property
    def is_missing(self) -> bool:
        """Whether whatever is given for the flag asks for a missing feature; of a count, 0 does not."""
        return self.not_built is not None and self.not_built.asks in (None, bool)

    @property
    def default(self) -> Any:
        """The value when the flag is not given; a list is a new one every time."""
        default = self.options["default"]
        return default() if callable(default) else copy(default)

    def is_asked(self, args: Namespace) -> bool:
        """Whether the argument has a value other than the default."""
        value = getattr(args, self.dest)
        return value is not None and value != self.default

    def asks_for_missing(self, value: Any) -> bool:
        """Whether ``value`` asks for the feature that is not built."""
        if self.not_built is None:
            return False
        asks = self.not_built.asks
        return bool(asks(value)) if asks else value != self.default

    def missing_choices(self) -> list[str]:
        """The choices that ask for the feature that is not built."""
        choices = self.options.get("choices", ())
        return [str(choice) for choice in choices if self.asks_for_missing(choice)]

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
    **facts: Any,
) -> Flag:
    """A flag with a value; text when no type is given, and a ``default`` may be a function to call.

    Args:
        facts: the other attributes of :class:`Flag`; one entry needs no tuple.
    """
    options: dict[str, Any] = {"default": default, "help": help}
    choices = None if choices is None else list(choices)
    optional = {"type": type, "choices": choices, "nargs": nargs, "metavar": metavar}
    options.update({key: entry for key, entry in optional.items() if entry is not None})
    return _flag(names, dest, options, facts)


def switch(
    *names: str, dest: str | None = None, default: bool | None = False, help: str = "", **facts: Any
) -> Flag:
    """A flag that turns something on."""
    return _flag(names, dest, {"action": "store_true", "default": default, "help": help}, facts)


def off_switch(name: str, dest: str, help: str = "", **facts: Any) -> Flag:
    """A flag that turns off what ``dest`` says, which is on by default."""
    return _flag((name,), dest, {"action": "store_false", "default": True, "help": help}, facts)


def alike(shared: Status | NoEffect, *flags: Flag) -> tuple[Flag, ...]:
    """The flags, with a status, or a condition without which they have no effect, that all of them have."""
    if isinstance(shared, NoEffect):
        return tuple(replace(flag, no_effect=(*flag.no_effect, shared)) for flag in flags)
    return tuple(replace(flag, status=(*flag.status, shared)) for flag in flags)


def _flag(names: tuple[str, ...], dest: str | None, options: dict[str, Any], facts: dict[str, Any]) -> Flag:
    for name in ("status", "needs", "opponents", "no_effect"):
        entries = facts.get(name, ())
        facts[name] = entries if isinstance(entries, tuple) else (entries,)
    return Flag(names, dest or _dest(names[0]), options, **facts)


def _dest(name: str) -> str:
    return name.lstrip("-").replace("-", "_")
