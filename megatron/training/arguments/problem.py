"""What is wrong with the arguments, and how all of it is told at once."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from megatron.core.errors import ConfigError

USAGE_STATUS = 2
# Where most words of a command line are missing, a shell has usually dropped them.
_ARRAY_HINT = 'if the flags stand in a shell array, pass "${NAME[@]}": $NAME is its first word alone'
_FEW_FLAGS = 4


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        flag: the flag it is about.
        value: what was given for it; None when nothing was, True for a switch.
        rule: what the value breaks.
        remedy: what would work.
        usage: the words themselves cannot be read, as opposed to values that cannot work together.
    """

    flag: str
    value: Any
    rule: str
    remedy: str = ""
    usage: bool = False

    def __str__(self) -> str:
        asked = self.flag if self.value is None or self.value is True else f"{self.flag} {_text(self.value)}"
        return f"{asked}: {self.rule}" + (f"; {self.remedy}" if self.remedy else "")


class ArgumentsError(ConfigError):
    """Every problem of a command line in one error.

    Args:
        problems: all of them.
        given: flags of the command line, where that is known.

    Attributes:
        problems: the list.
        exit_status: 2 when a word could not be read, otherwise 1.
    """

    def __init__(self, problems: Iterable[Problem], given: Collection[str] | None = None):
        self.problems = tuple(problems)
        super().__init__(report(self.problems, given))
        self.exit_status = USAGE_STATUS if any(problem.usage for problem in self.problems) else 1


def report(problems: Iterable[Problem], given: Collection[str] | None = None) -> str:
    """The text of an error message: one line for one problem, a list for several.

    Args:
        problems: all of them.
        given: flags of the command line that could be read, where that is known.
    """
    problems = list(problems)
    lines = [str(problem) for problem in problems]
    if _looks_like_an_array(problems, given):
        lines.append(_ARRAY_HINT)
    if len(lines) == 1:
        return lines[0]
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return f"{count} with the arguments\n" + "\n".join(f"  {line}" for line in lines)


def _looks_like_an_array(problems: list[Problem], given: Collection[str] | None) -> bool:
    """A flag that takes a value stands alone, or hardly any flag was given and several are missing."""
    if any(problem.usage and problem.rule.startswith("needs a value") for problem in problems):
        return True
    missing = [problem for problem in problems if "is required" in problem.rule]
    return given is not None and 0 < len(given) <= _FEW_FLAGS and len(missing) > 1


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return str(getattr(value, "name", value))
