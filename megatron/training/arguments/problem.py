"""What is wrong with the arguments, and how all of it is told at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron.core.errors import ConfigError

USAGE_STATUS = 2


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

    Attributes:
        problems: the list.
        exit_status: 2 when a word could not be read, otherwise 1.
    """

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(problems)
        super().__init__(report(self.problems))
        self.exit_status = USAGE_STATUS if any(problem.usage for problem in self.problems) else 1


def report(problems: Iterable[Problem]) -> str:
    """The text of an error message: one line for one problem, a list for several."""
    lines = [str(problem) for problem in problems]
    if len(lines) == 1:
        return lines[0]
    return f"{len(lines)} problems with the arguments\n" + "\n".join(f"  {line}" for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return str(getattr(value, "name", value))
