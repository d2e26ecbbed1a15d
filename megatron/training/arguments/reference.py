"""All flags as a page: ``python -m megatron.training.arguments.reference > docs/flags.md``."""

import re
from collections import Counter
from collections.abc import Sequence

from megatron.training.arguments.flag import (
    MOST,
    Accepted,
    Alias,
    Flag,
    Group,
    NoEffect,
    NotBuilt,
    Refused,
    Status,
    never,
)
from megatron.training.arguments.flags import ALL_FLAGS, GROUPS

INTRODUCTION = """\
# Flags

Generated from the rows in `megatron/training/arguments/flags`; after a change of a row, write this page anew:

    python -m megatron.training.arguments.reference > docs/flags.md

Flags that are accepted without effect parse, and a line of the run's output says why they change nothing.
Flags that are refused, or whose feature is not built yet, stop the run before anything is allocated. A flag
that has no effect in the company in which it was given is named in a warning.
"""


def page() -> str:
    """The page, in Markdown."""
    return "\n".join([INTRODUCTION, _counts(), *(_section(group) for group in GROUPS)])


def _counts() -> str:
    kinds = Counter(_kind(flag) for flag in ALL_FLAGS)
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    return f"{len(ALL_FLAGS)} flags: {listed}.\n"


def _kind(flag: Flag) -> str:
    if flag.is_inert:
        return "are accepted without effect"
    if flag.refusal:
        return "are refused"
    return "are not built yet" if flag.is_missing else "work, some with part of their values"


def _section(group: Group) -> str:
    rows = [
        f"| {' '.join(f'`{name}`' for name in flag.names)} | {_value(flag)} | {_default(flag)} "
        f"| {_prose(_meaning(flag))} |"
        for flag in group.flags
    ]
    head = ["| Flag | Value | Default | Meaning and status |", "| --- | --- | --- | --- |"]
    return "\n".join([f"## {group.title[0].upper()}{group.title[1:]}", "", *head, *rows, ""])


def _prose(text: str) -> str:
    """Text as Markdown in a cell: flags as code, and no HTML."""
    escaped = text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")
    return re.sub(r"--[A-Za-z][\w-]+", r"`\g<0>`", escaped)


def _value(flag: Flag) -> str:
    """What follows the flag, and how large it may be."""
    options = flag.options
    if "action" in options:
        return "switch"
    if "choices" in options:
        return ", ".join(f"`{choice}`" for choice in options["choices"] if choice is not None)
    if "metavar" in options:
        return ", ".join(f"`{choice}`" for choice in options["metavar"].strip("{}").split(","))
    kind = {int: "N", float: "X"}.get(options.get("type"), "text")
    limits = [str(flag.bounds)] if flag.bounds else []
    limits += [f"at most {flag.most}"] if flag.most < MOST else []
    return ", ".join([f"{kind} ..." if "nargs" in options else kind, *limits])


def _default(flag: Flag) -> str:
    default = flag.options["default"]
    if callable(default):
        return "from the environment"
    if "action" in flag.options or default in (None, "", []):
        return ""
    return " ".join(f"`{item}`" for item in (default if isinstance(default, list) else [default]))


def _meaning(flag: Flag) -> str:
    """The help, then every other fact as a sentence."""
    facts = [_status(flag, status) for status in flag.status]
    facts += [f"needs {entry.words}" for entry in flag.needs]
    facts += [f"excludes {opponent.name}" for opponent in flag.opponents]
    facts += [_no_effect(entry) for entry in flag.no_effect]
    if flag.saving:
        facts.append(f"the notice estimates what is not saved: {flag.saving.what}")
    if flag.read:
        facts.append(f"read {flag.read}")
    if flag.added:
        facts.append("added to the flags of the original")
    return ". ".join(fact[0].upper() + fact[1:] for fact in (flag.options["help"], *facts)) + "."


def _status(flag: Flag, status: Status) -> str:
    if isinstance(status, Refused):
        return f"refused{_with(status.values)}: {status.reason}{_remedy(status.remedy)}"
    if isinstance(status, NotBuilt):
        which = "" if flag.is_missing else _with(flag.missing_choices()) or ", with some values"
        return f"not built yet{which}: {status.feature}{_remedy(status.remedy)}"
    if isinstance(status, Accepted):
        return f"accepted without effect: {status.text}"
    return f"an alias: {status.text}" if isinstance(status, Alias) else status.text


def _with(values: Sequence[str]) -> str:
    return f", with {', '.join(values)}" if values else ""


def _remedy(remedy: str) -> str:
    return "" if remedy == "leave it out" else f"; {remedy}"


def _no_effect(entry: NoEffect) -> str:
    """A reason that holds in some company only is told as such."""
    sometimes = entry.acts is not never and entry.reason.startswith(":")
    return f"{'may have no effect' if sometimes else 'has no effect'}{entry.reason}"


if __name__ == "__main__":
    print(page(), end="")
