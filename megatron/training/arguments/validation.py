"""From a parsed namespace to a complete one, or to one error that lists everything that is wrong."""

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron.core.errors import ConfigError
from megatron.training.arguments import checks, derive
from megatron.training.arguments.flag import Withdrawn
from megatron.training.arguments.flags import ALL_FLAGS
from megatron.training.arguments.presets import apply_preset
from megatron.training.arguments.problem import ArgumentsError, Problem
from megatron.training.arguments.rules import RULES
from megatron.training.arguments.spellings import with_flags


@dataclass
class Outcome:
    """What checking found: problems, and lines for rank 0 to print when there are none."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def validate_args(args: Namespace, defaults: Mapping[str, Any] = {}) -> Namespace:
    """Derive what follows from the arguments and check all rules, before anything is allocated.

    Args:
        args: from ``parse_args``; completed in place.
        defaults: values for attributes that are still None.

    Returns:
        ``args``.

    Raises:
        ArgumentsError: one error with every problem.
    """
    given = getattr(args, "given_flags", None)
    outcome = _check(args, defaults)
    if outcome.problems:
        raise ArgumentsError(outcome.problems, given)
    if args.rank == 0:
        for note in outcome.notes:
            print(note, flush=True)
    if args.deterministic_mode:
        import torch

        torch.use_deterministic_algorithms(True)
    return args


def find_problems(args: Namespace, defaults: Mapping[str, Any] = {}) -> list[Problem]:
    """Every rule that ``args`` breaks.  Completes ``args`` in place, as far as they go."""
    return _check(args, defaults).problems


def completed(args: Namespace, defaults: Mapping[str, Any] = {}) -> Namespace:
    """``args``, completed in place as far as they go, without looking for problems."""
    _complete(args)
    given = _given(args)
    _script_defaults(args, defaults, given)
    _derive(args, given)
    return args


def _derive(args: Namespace, given: list[str]) -> list[str]:
    steps = (apply_preset, derive.checkpoint_format, *derive.STEPS)
    return [note for step in steps for note in step(args, given)]


def _check(args: Namespace, defaults: Mapping[str, Any]) -> Outcome:
    _complete(args)
    given = _given(args)
    outcome = Outcome(notes=_script_defaults(args, defaults, given))
    refused = checks.refused_problems(args, given)
    if beyond := checks.numbers_beyond_limits(args):
        return Outcome(_as_typed(refused + beyond, given))
    outcome.notes += apply_preset(args, given)
    outcome.notes += derive.checkpoint_format(args, given)
    refused += checks.not_built_problems(args)
    for step in derive.STEPS:
        outcome.notes += step(args, given)
    refused_flags = {problem.flag for problem in refused}
    broken = [problem for rule in (*checks.RULES, *RULES) for problem in rule(args, given)]
    outcome.problems = refused + [problem for problem in broken if problem.flag not in refused_flags]
    outcome.problems = _as_typed(outcome.problems, given)
    if not outcome.problems:
        outcome.problems = _config_problems(args)
    if not outcome.problems:
        outcome.notes += checks.notices_about(args, given)
        outcome.notes += checks.warnings_about(args, given).values()
    for flag in ALL_FLAGS:
        if isinstance(flag.refusal, Withdrawn):
            vars(args).pop(flag.dest, None)
    return outcome


def _as_typed(problems: list[Problem], given: list[str]) -> list[Problem]:
    """The problems in the spellings of the command line, where a flag has several."""
    used = {flag.dest: name for flag in ALL_FLAGS for name in flag.names if name in given}
    typed = {flag.name: used[flag.dest] for flag in ALL_FLAGS if flag.dest in used and flag.name not in given}

    def renamed(text: str) -> str:
        return re.sub(r"--[\w-]+", lambda found: typed.get(found[0], found[0]), text)

    return [
        replace(p, flag=renamed(p.flag), rule=renamed(p.rule), remedy=renamed(p.remedy)) if typed else p
        for p in problems
    ]


def _complete(args: Namespace) -> None:
    """Give a namespace that was not made by the parser what it lacks."""
    for flag in ALL_FLAGS:
        if not hasattr(args, flag.dest):
            setattr(args, flag.dest, flag.default)
    for name, value in (("rank", 0), ("world_size", 1)):
        if not hasattr(args, name):
            setattr(args, name, value)


def _given(args: Namespace) -> list[str]:
    """The flags on the command line; for other namespaces, those that differ from their default."""
    vars(args).pop("own_flags", None)
    given = vars(args).pop("given_flags", None)
    if given is None:
        given = [flag.name for flag in ALL_FLAGS if getattr(args, flag.dest) != flag.default]
    return list(dict.fromkeys(given))


def _script_defaults(args: Namespace, defaults: Mapping[str, Any], given: list[str]) -> list[str]:
    """Fill in the entry point's defaults; whoever overrides one is told."""
    notes = []
    for name, value in defaults.items():
        current = getattr(args, name, None)
        if current is None:
            setattr(args, name, value)
        elif current != value:
            notes.append(f"WARNING: overriding default arguments for {name}:{value} with {name}:{current}")
    return notes


def _config_problems(args: Namespace) -> list[Problem]:
    """The model's config has rules of its own; learn of them now instead of when the model is built."""
    from megatron.core.transformer.pipeline_layout import get_layer_counts
    from megatron.training.arguments.model_config import core_transformer_config_from_args

    try:
        get_layer_counts(core_transformer_config_from_args(args))
    except ConfigError as error:
        return [Problem("model", None, with_flags(line)) for line in str(error).splitlines()]
    return []
