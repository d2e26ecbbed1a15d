"""Command-line arguments: flags, what follows from them, the rules they obey.

``flags/`` holds one row per flag, one file per section.  ``scan`` and ``parsing`` read the command line,
``derive`` completes it, ``checks`` holds it against the rows and ``rules/`` against what several flags have
to do with each other, ``model_config`` turns it into configs.  ``help`` and ``reference`` print the rows.
"""

from typing import Any

from megatron.training.arguments.compat import (
    _add_tokenizer_args,
    _check_arg_is_not_none,
    _print_args,
    load_retro_args,
    load_retro_config,
    validate_model_config_args_from_heterogeneous_config,
)
from megatron.training.arguments.dump import print_args
from megatron.training.arguments.parsing import add_megatron_arguments, parse_args
from megatron.training.arguments.problem import ArgumentsError, Problem
from megatron.training.arguments.validation import validate_args
from megatron.training.arguments.values import moe_freq_type


def __getattr__(name: str) -> Any:
    """``core_transformer_config_from_args`` on first use: tools that only read flags need no torch."""
    if name != "core_transformer_config_from_args":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron.training.arguments.model_config import core_transformer_config_from_args

    return core_transformer_config_from_args
