"""What ``-h`` and ``--help`` print: a short form, all flags in sections, or those that a word finds."""

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron.training.arguments.flag import Accepted, Flag, Notice, Refused
from megatron.training.arguments.flags import ALL_FLAGS, flags_by_name

_COLUMNS, _HELP_COLUMN = 110, 38

# The flags of the short form, section by section.
COMMON = {
    "model": "num-layers hidden-size ffn-hidden-size num-attention-heads group-query-attention "
    "num-query-groups seq-length max-position-embeddings position-embedding-type normalization swiglu "
    "untie-embeddings-and-output-weights",
    "training": "micro-batch-size global-batch-size train-iters lr min-lr lr-decay-style lr-warmup-iters "
    "weight-decay clip-grad bf16 fp16 recompute-granularity seed",
    "data": "data-path split tokenizer-type tokenizer-model vocab-file merge-file mock-data",
    "checkpoints": "save load save-interval finetune exit-signal-handler",
    "processes": "tensor-model-parallel-size sequence-parallel pipeline-model-parallel-size "
    "num-layers-per-virtual-pipeline-stage context-parallel-size use-distributed-optimizer "
    "overlap-grad-reduce overlap-param-gather",
    "evaluation and logs": "eval-interval eval-iters log-interval log-arguments log-throughput "
    "tensorboard-dir",
}


@dataclass(frozen=True)
class _Section:
    """Flags under one title; those that do not work share one text instead of one each."""

    title: str
    actions: tuple[argparse.Action, ...]
    shared_text: str = ""

    def narrowed_to(self, words: Sequence[str]) -> "_Section":
        """The flags whose name, meaning or section holds one of ``words``."""

        def found(*texts: str | None) -> bool:
            return any(word in (text or "").lower() for word in words for text in texts)

        if found(self.title, self.shared_text):
            return self
        actions = tuple(action for action in self.actions if found(*action.option_strings, action.help))
        return _Section(self.title, actions, self.shared_text)


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line holds ``-h`` or ``--help``."""
    return any(word in ("-h", "--help") for word in words)


def help_text(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """The text that a command line with ``-h`` or ``--help`` asks for.

    Args:
        parser: holds all flags, those of a user's script too.
        words: of the command line. ``-h`` asks for the short form, ``--help`` for all sections, and
            ``--help WORD ...`` for the flags whose name, meaning or section holds one of the words.
    """
    if "--help" not in words:
        return _short_form(parser)
    sections = _sections(parser)
    wanted = [word.lower() for word in words[words.index("--help") + 1 :] if not word.startswith("-")]
    if wanted:
        sections = [section.narrowed_to(wanted) for section in sections]
    sections = [section for section in sections if section.actions]
    if not sections:
        return f"No flag has {' or '.join(wanted)} in its name or meaning; --help lists all.\n"
    formatter = _formatter(parser)
    formatter.add_text(f"usage: {parser.prog} [flags]")
    for title, group in groupby(sections, key=lambda section: section.title):
        formatter.start_section(title)
        for section in group:
            _add_flags(formatter, section)
        formatter.end_section()
    return formatter.format_help()


def _short_form(parser: argparse.ArgumentParser) -> str:
    by_name = {name: action for action in parser._actions for name in action.option_strings}
    formatter = _formatter(parser)
    formatter.add_text(f"usage: {parser.prog} [flags]")
    for title, names in COMMON.items():
        formatter.start_section(title)
        _add_flags(formatter, _Section(title, tuple(by_name[f"--{name}"] for name in names.split())))
        formatter.end_section()
    formatter.add_text(
        f"These are {sum(len(names.split()) for names in COMMON.values())} of {len(parser._actions)} flags.\n"
        "--help lists all of them, --help WORD those that have to do with a word, such as --help checkpoint."
    )
    return formatter.format_help()


def _sections(parser: argparse.ArgumentParser) -> list[_Section]:
    """Working flags by group, then those that have a notice, change nothing or are refused, by reason."""
    sections = [
        _Section(
            group.title or "", tuple(a for a in group._group_actions if (f := _flag(a)) is None or f.is_plain)
        )
        for group in parser._action_groups
    ]
    by_name = {name: action for action in parser._actions for name in action.option_strings}
    by_reason: dict[Notice | Refused, list[argparse.Action]] = {}
    for flag in ALL_FLAGS:
        reason = flag.notice or flag.refusal
        if reason and flag.name in by_name:
            by_reason.setdefault(reason, []).append(by_name[flag.name])
    titles = ("accepted, with a notice", "accepted without effect", "refused")
    sections += [_Section(_title(reason), tuple(found), _text(reason)) for reason, found in by_reason.items()]
    return sorted(
        sections, key=lambda section: titles.index(section.title) if section.title in titles else -1
    )


def _flag(action: argparse.Action) -> Flag | None:
    """The row of an action; None for flags of a user's script."""
    return next((flags_by_name()[name] for name in action.option_strings if name in flags_by_name()), None)


def _title(reason: Notice | Refused) -> str:
    if isinstance(reason, Refused):
        return "refused"
    return "accepted without effect" if isinstance(reason, Accepted) else "accepted, with a notice"


def _text(reason: Notice | Refused) -> str:
    return f"{reason.reason}; {reason.remedy}" if isinstance(reason, Refused) else reason.text


def _formatter(parser: argparse.ArgumentParser) -> argparse.HelpFormatter:
    return argparse.RawTextHelpFormatter(parser.prog, max_help_position=_HELP_COLUMN, width=_COLUMNS)


def _add_flags(formatter: argparse.HelpFormatter, section: _Section) -> None:
    if section.shared_text:
        names = ", ".join(action.option_strings[0] for action in section.actions)
        formatter.add_text(
            "\n".join(_wrapped(names) + ["  " + line for line in _wrapped(section.shared_text)])
        )
    else:
        formatter.add_arguments([_described(action) for action in section.actions])


def _described(action: argparse.Action) -> argparse.Action:
    """A copy of ``action`` whose help also says what is not built and what the default is."""
    shown = argparse.Action(
        action.option_strings,
        action.dest,
        nargs=action.nargs,
        metavar=action.metavar if action.metavar or action.nargs == 0 else _value_name(action),
    )
    text = " ".join(part for part in (action.help, _not_built_mark(action), _default_note(action)) if part)
    shown.help = "\n".join(_wrapped(text, _COLUMNS - _HELP_COLUMN)).replace("%", "%%")
    return shown


def _wrapped(text: str, columns: int = _COLUMNS - 4) -> list[str]:
    return textwrap.wrap(text, columns, break_long_words=False, break_on_hyphens=False)


def _value_name(action: argparse.Action) -> str:
    """``{a,b}`` for choices, else what kind of value it is."""
    if action.choices is not None:
        return "{" + ",".join(str(choice) for choice in action.choices) + "}"
    return {int: "N", float: "X"}.get(action.type, "VALUE")  # type: ignore[call-overload]


def _default_note(action: argparse.Action) -> str:
    if action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS) or action.default == []:
        return ""
    return f"(default: {action.default})"


def _not_built_mark(action: argparse.Action) -> str:
    """``[not built yet]``, with the values that it holds for where the flag works with others."""
    flag = _flag(action)
    if flag is None or flag.not_built is None:
        return ""
    if flag.is_missing:
        return "[not built yet]"
    values = flag.missing_choices()
    return f"[not built yet: {', '.join(values)}]" if values else "[partly not built yet]"
