"""From the words of a command line to a namespace."""

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from copy import deepcopy

from megatron.training.arguments.flags import GROUPS, flags_by_name
from megatron.training.arguments.help import asks_for_help, help_text
from megatron.training.arguments.problem import USAGE_STATUS, Problem, report
from megatron.training.arguments.scan import scan

ExtraArgs = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def add_megatron_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every flag of the pretraining entry points to ``parser`` and return it."""
    for group in GROUPS:
        group.add_to(parser)
    return parser


def build_parser(extra_args_provider: ExtraArgs | None = None) -> argparse.ArgumentParser:
    """The parser of the pretraining entry points; flags cannot be abbreviated."""
    parser = argparse.ArgumentParser(description="Megatron-NPU arguments", allow_abbrev=False)
    add_megatron_arguments(parser)
    return extra_args_provider(parser) if extra_args_provider else parser


def parse_args(extra_args_provider: ExtraArgs | None = None, ignore_unknown_args: bool = False) -> Namespace:
    """Parse ``sys.argv``, or the file named by ``--yaml-cfg``.

    ``rank`` and ``world_size`` come from the environment variables RANK and WORLD_SIZE.

    Args:
        extra_args_provider: adds flags to the parser and returns it.
        ignore_unknown_args: drop unknown flags instead of failing.

    Raises:
        SystemExit: status 2, when words cannot be used.  All of them, and every rule that the rest breaks,
            have then been printed to stderr by rank 0.
        ArgumentsError: the YAML file cannot be used.
    """
    parser = build_parser(extra_args_provider)
    words = sys.argv[1:]
    if asks_for_help(words):
        print(help_text(parser, words), end="")
        raise SystemExit(0)
    found = scan(parser, words, ignore_unknown_args)
    args = _parse_words(parser, found.words, ignore_unknown_args)
    args.rank, args.world_size = rank_and_world_size()
    args.given_flags = tuple(found.given)
    args.own_flags = _own_flags(parser, found.given)
    if found.problems:
        problems = [*found.problems, *_rule_problems(args, found.tainted)]
        if args.rank == 0:
            print(f"error: {report(problems, found.given)}", file=sys.stderr, flush=True)
        raise SystemExit(USAGE_STATUS)
    if found.backslashes and args.rank == 0:
        print(
            f"WARNING: dropped {found.backslashes} lone backslash(es) from the command line: in the script a "
            "blank follows a backslash at the end of a line",
            flush=True,
        )
    if args.yaml_cfg is not None:
        from megatron.training.yaml_arguments import namespace_from_yaml

        args = namespace_from_yaml(args, parser)
    return args


def _parse_words(
    parser: argparse.ArgumentParser, words: Sequence[str], ignore_unknown: bool
) -> argparse.Namespace:
    if ignore_unknown:
        return parser.parse_known_args(words)[0]
    return parser.parse_args(words)


def _own_flags(parser: argparse.ArgumentParser, given: Sequence[str]) -> dict[str, str]:
    """Flags among ``given`` that the script has added itself, and the arguments that hold their values."""
    known = flags_by_name()
    return {name: parser._option_string_actions[name].dest for name in given if name not in known}


def rank_and_world_size() -> tuple[int, int]:
    """RANK and WORLD_SIZE of the launcher; 0 and 1 without one, or when they are no numbers."""
    return _number_of("RANK", 0), _number_of("WORLD_SIZE", 1)


def _number_of(variable: str, default: int) -> int:
    word = os.environ.get(variable, "")
    return int(word) if word.isdigit() else default


def _rule_problems(args: Namespace, tainted: set[str]) -> list[Problem]:
    """What the readable part of a faulty command line breaks, without what follows from its faults."""
    from megatron.training.arguments.validation import find_problems

    return [problem for problem in find_problems(deepcopy(args)) if problem.flag not in tainted]
