"""Read the words of a command line before argparse does, so that every fault is found, not the first one.

argparse stops at the first word it cannot use.  ``scan`` looks at all of them, reports what is wrong, and
hands on only the words that argparse will take.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron.training.arguments.problem import Problem
from megatron.training.arguments.values import suggestion

EXAMPLES = {int: "a whole number", float: "a number"}


@dataclass
class Scan:
    """What the words of a command line amount to.

    Attributes:
        words: the words argparse can take.
        given: the flags among them, as spelled, in order.
        problems: one for every word that cannot be used.
        tainted: flags whose value is unknown because of a problem; rules about them would mislead.
        backslashes: number of lone backslashes that were dropped.
    """

    words: list[str] = field(default_factory=list)
    given: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    tainted: set[str] = field(default_factory=set)
    backslashes: int = 0

    def blame(self, flag: str, problem: Problem) -> None:
        self.problems.append(problem)
        self.tainted.add(flag)


def scan(parser: argparse.ArgumentParser, words: Sequence[str], ignore_unknown: bool = False) -> Scan:
    """Sort the words into usable ones and problems.

    Args:
        parser: the complete parser.
        words: the command line without the program name.
        ignore_unknown: drop unknown flags and stray words instead of reporting them.
    """
    found = Scan()
    # argparse has no public way to ask for its flags.
    known = parser._option_string_actions
    has_positionals = any(not action.option_strings for action in parser._actions)
    for flag, explicit, values in _occurrences(words, found):
        if flag is None:
            if has_positionals:
                found.words += values
            elif not ignore_unknown:
                found.problems += [_stray(word) for word in values]
        elif flag not in known:
            if not ignore_unknown:
                _report_unknown(found, flag, known)
        else:
            _take(found, parser, flag, known[flag], explicit, values, ignore_unknown or has_positionals)
    for action in parser._actions:
        if action.required and not set(action.option_strings) & {*found.given, *found.tainted}:
            action.required = False
            if action.option_strings:
                name = action.option_strings[-1]
                found.blame(name, Problem(name, None, "is required", "give it a value", usage=True))
    return found


def _occurrences(words: Sequence[str], found: Scan) -> Iterator[tuple[str | None, bool, list[str]]]:
    """(flag, value joined with "=", values) per flag; flag None for words in front of the first flag."""
    flag: str | None = None
    explicit, values = False, []
    for word in words:
        if word.strip() == "\\":
            found.backslashes += 1
        elif _is_flag(word):
            if flag is not None or values:
                yield flag, explicit, values
            flag, equals, value = word.partition("=")
            explicit, values = bool(equals), [value] if equals else []
        else:
            values.append(word)
    if flag is not None or values:
        yield flag, explicit, values


def _is_flag(word: str) -> bool:
    """Whether argparse would take the word for a flag; negative numbers are values."""
    if not word.startswith("-") or word == "-" or " " in word.partition("=")[0]:
        return False
    try:
        float(word)
    except ValueError:
        return True
    return False


def _take(
    found: Scan,
    parser: argparse.ArgumentParser,
    flag: str,
    action: argparse.Action,
    explicit: bool,
    values: list[str],
    tolerate_stray: bool,
) -> None:
    """One known flag with the words that follow it."""
    count = _count(action, explicit, values)
    if isinstance(count, str):
        found.blame(flag, Problem(flag, None, count, _remedy(action, flag), usage=True))
        found.problems += [] if tolerate_stray else [_stray(word, flag) for word in values[1:]]
        return
    used, stray = values[:count], values[count:]
    faults = [fault for word in used if (fault := _fault(parser, action, flag, word))]
    if faults:
        for fault in faults:
            found.blame(flag, fault)
        return
    if stray and not tolerate_stray:
        found.problems += [_stray(word, flag) for word in stray]
        stray = []
    found.given.append(flag)
    # With "=", argparse takes the value as it is, even when it begins with a dash.
    found.words += [f"{flag}={used[0]}"] if len(used) == 1 else [flag, *used]
    found.words += stray


def _count(action: argparse.Action, explicit: bool, values: list[str]) -> int | str:
    """How many of the words the flag takes, or what is wrong with their number."""
    nargs, given = action.nargs, len(values)
    if nargs == 0:
        return f"is a switch and takes no value, got {values[0]!r}" if explicit else 0
    if explicit:
        # argparse ends the list of a joined value there.
        given = 1
    if nargs is None or nargs == "+" or isinstance(nargs, int):
        needed = nargs if isinstance(nargs, int) else 1
        if given < needed:
            return "needs a value" if needed == 1 else f"needs {needed} values, got {given}"
        return given if nargs == "+" else needed
    return min(given, 1) if nargs == "?" else given


def _fault(parser: argparse.ArgumentParser, action: argparse.Action, flag: str, word: str) -> Problem | None:
    """What is wrong with one value."""
    convert = parser._registry_get("type", action.type, action.type) or str
    try:
        value = convert(word)
    except argparse.ArgumentTypeError as error:
        return Problem(flag, word, str(error), usage=True)
    except (TypeError, ValueError, OverflowError):
        kind = EXAMPLES.get(action.type, f"a {getattr(action.type, '__name__', 'valid value')}")
        return Problem(flag, word, f"{word!r} is not {kind}", _remedy(action, flag), usage=True)
    if action.choices is not None and value not in action.choices:
        listed = ", ".join(str(choice) for choice in action.choices if choice is not None)
        near = suggestion(word, [choice for choice in action.choices if choice is not None])
        return Problem(flag, word, f"is not one of {listed}{near}", usage=True)
    return None


def _remedy(action: argparse.Action, flag: str) -> str:
    if action.nargs == 0:
        return f"write {flag} alone"
    if action.choices:
        example = next(choice for choice in action.choices if choice is not None)
    elif action.default not in (None, [], ""):
        example = action.default[0] if isinstance(action.default, list) else action.default
    else:
        example = {int: 1, float: 0.1}.get(action.type, str(action.metavar or action.dest).upper())
    return f"for example {flag} {getattr(example, 'name', example)}"


def _stray(word: str, after: str | None = None) -> Problem:
    where = f"does not belong to {after}" if after else "belongs to no flag"
    return Problem(repr(word), None, where, "quote it or leave it out", usage=True)


def _report_unknown(found: Scan, flag: str, known: dict[str, argparse.Action]) -> None:
    near = nearest_flag(flag, known)
    remedy = f"did you mean {near}?" if near else "see --help for the list"
    found.blame(flag, Problem(flag, None, "no such flag", remedy, usage=True))
    if near:
        found.tainted.add(near)


def nearest_flag(flag: str, known: dict[str, argparse.Action]) -> str | None:
    """The known flag that was probably meant: other dashes, a longer form, or the nearest spelling."""
    from difflib import get_close_matches

    dashed = "--" + flag.lstrip("-").replace("_", "-").lower()
    folded = {name.replace("_", "-").lower(): name for name in known}
    if dashed in folded:
        return folded[dashed]
    longer = [name for name in folded if name.startswith(dashed)] if len(dashed) > 5 else []
    near = get_close_matches(dashed, folded, n=1, cutoff=0.75)
    if near or longer:
        return folded[(longer or near)[0]] if len(longer) == 1 else folded[(near or longer)[0]]
    return None
