"""What the rows of the flags say about a set of arguments: problems, warnings and notices."""

from argparse import Namespace
from collections.abc import Collection

from megatron.training.arguments.flag import Flag, Refused
from megatron.training.arguments.flags import ALL_FLAGS, flags_by_name
from megatron.training.arguments.problem import Problem
from megatron.training.arguments.savings import lost_saving


def refused_problems(args: Namespace, given: Collection[str]) -> list[Problem]:
    """A problem for every refused flag in ``given`` and every refused value in ``args``."""
    problems = []
    for flag in ALL_FLAGS:
        for status in flag.status:
            if isinstance(status, Refused):
                asked = getattr(args, flag.dest, None)
                names = (flag.name,) if asked in status.values else ()
                if not status.values:
                    names = tuple(name for name in flag.names if name in given)
                problems += [Problem(name, asked, status.reason, status.remedy) for name in names]
    return problems


def not_built_problems(args: Namespace) -> list[Problem]:
    """A problem for every feature that ``args`` ask for and that does not exist yet."""
    problems = []
    for flag in ALL_FLAGS:
        value = getattr(args, flag.dest, flag.default)
        if flag.not_built and flag.asks_for_missing(value):
            rule = f"{flag.not_built.feature} is not built yet"
            problems.append(Problem(flag.name, _shown(value), rule, flag.not_built.remedy))
    return problems


def numbers_beyond_limits(args: Namespace) -> list[Problem]:
    """Numbers so large that the rules, which count, are not asked about them."""
    problems = []
    for flag in ALL_FLAGS:
        number = getattr(args, flag.dest)
        if flag.is_plain and type(number) is int and number > flag.most:
            rule = f"must be at most {flag.most}"
            problems.append(Problem(flag.name, number, rule, f"use a smaller {flag.name}"))
    return problems


def numbers_in_range(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Every number lies in its range."""
    problems = []
    for flag, bounds in ((flag, flag.bounds) for flag in ALL_FLAGS if flag.bounds):
        number = getattr(args, flag.dest)
        if number is None or isinstance(number, bool) or bounds.holds(number):
            continue
        works = flag.default
        if not isinstance(works, (int, float)) or not bounds.holds(works):
            works = bounds.example()
        remedy = f"for example {flag.name} {works}"
        problems.append(Problem(flag.name, number, f"must be {bounds}", remedy))
    return problems


def needs_are_met(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Flags come with what they need."""
    return [
        Problem(flag.name, _shown(getattr(args, flag.dest)), f"needs {entry.words}", entry.remedy)
        for flag in ALL_FLAGS
        if flag.needs and flag.is_asked(args)
        for entry in flag.needs
        if not entry.met(args)
    ]


def opponents_are_absent(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Of two flags that exclude each other, one is given at most."""
    return [
        Problem(flag.name, _shown(getattr(args, flag.dest)), f"excludes {opponent.name}", opponent.remedy)
        for flag in ALL_FLAGS
        for opponent in flag.opponents
        if flag.is_asked(args) and flags_by_name()[opponent.name].is_asked(args)
    ]


def _shown(value: object) -> object:
    """The value as a problem shows it: a switch has none."""
    return None if isinstance(value, bool) else value


def notices_about(args: Namespace, given: Collection[str]) -> list[str]:
    """The lines that flags in ``given`` print because they change nothing, or work in a way of their own."""
    flags = [(name, flags_by_name()[name]) for name in given if name in flags_by_name()]
    return [
        f"notice: {name}: {flag.notice.text}{lost_saving(flag.saving, args)}"
        for name, flag in flags
        if flag.notice
    ]


def warnings_about(args: Namespace, given: Collection[str]) -> dict[str, str]:
    """One line for every flag in ``given`` that changes nothing here, by the flag as it was spelled."""
    lines: dict[str, str] = {}
    for flag in ALL_FLAGS:
        name = _spelling(flag, given)
        reason = name and next((entry.reason for entry in flag.no_effect if not entry.acts(args)), None)
        if name and reason:
            lines[name] = f"WARNING: {name} has no effect{reason}"
    return lines


def _spelling(flag: Flag, given: Collection[str]) -> str | None:
    """How the flag was written; None if it was not."""
    return next((name for name in flag.names if name in given), None)


RULES = (numbers_in_range, needs_are_met, opponents_are_absent)
