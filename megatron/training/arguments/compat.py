"""Names that other people's scripts import from ``megatron.training.arguments``; nothing here calls them."""

import argparse
from argparse import Namespace

from megatron.core.errors import ConfigError
from megatron.training.arguments.dump import format_args
from megatron.training.arguments.flags import data


def _add_tokenizer_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the tokenizer flags alone (data tools)."""
    data.TOKENIZER.add_to(parser)
    return parser


def _print_args(title: str, args: Namespace) -> None:
    """Every argument on rank 0, under a title."""
    if getattr(args, "rank", 0) == 0:
        print(f"{title}:\n{format_args(args)}", flush=True)


def _check_arg_is_not_none(args: Namespace, arg: str) -> None:
    """Raises AssertionError if the argument has no value."""
    if getattr(args, arg) is None:
        raise AssertionError(f"the argument {arg} has no value: give --{arg.replace('_', '-')}")


def validate_model_config_args_from_heterogeneous_config(args: Namespace) -> None:
    """Refuses a file of per-layer shapes; does nothing when none is given."""
    path = getattr(args, "heterogeneous_layers_config_path", None)
    if path or getattr(args, "heterogeneous_layers_config_encoded_json", None):
        raise _refuse("per-layer architectures from a file", "--heterogeneous-layers-config-path")


def load_retro_config(retro_project_dir: str) -> None:
    """Always refuses."""
    raise _refuse("retrieval-enhanced (Retro) models", f"--retro-project-dir {retro_project_dir}")


def load_retro_args(args: Namespace) -> None:
    """Refuses a Retro project; does nothing when none is given."""
    if getattr(args, "retro_project_dir", None):
        load_retro_config(args.retro_project_dir)


def _refuse(models: str, flag: str) -> ConfigError:
    return ConfigError(f"{flag}: {models} are not part of this project; leave the flag out")
