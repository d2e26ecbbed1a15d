"""Arguments from a YAML file (``--yaml-cfg``) instead of the command line.

The file holds argument names at the top level, fields of the model's config under ``language_model`` and of
the parallel config under ``model_parallel``.  ``${NAME}`` stands for an environment variable.  Keys that are
absent keep the command line's defaults, and the rules are those of the command line.
"""

import argparse
import dataclasses
import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from megatron.core.errors import ConfigError
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.arguments.flag import Flag
from megatron.training.arguments.flags import ALL_FLAGS
from megatron.training.arguments.model_config import core_transformer_config_from_args
from megatron.training.arguments.problem import ArgumentsError, Problem
from megatron.training.arguments.validation import find_problems, validate_args
from megatron.training.arguments.values import suggestion

SECTIONS = ("language_model", "model_parallel")
VARIABLE = re.compile(r"\$\{([^}]*)\}")
FLAG_OF_DEST = {flag.dest: flag for flag in reversed(ALL_FLAGS)}
ACTIVATIONS = {"swiglu": "swiglu", "squaredrelu": "squared_relu", "gelu": None}
Pairs = dict[str, Any]

# Config fields that argument names spell differently.
_RENAMED = {
    "layernorm_epsilon": "norm_epsilon",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
    "num_moe_experts": "num_experts",
    "num_layers_in_first_pipeline_stage": "decoder_first_pipeline_num_layers",
    "num_layers_in_last_pipeline_stage": "decoder_last_pipeline_num_layers",
    "fp8_param": "fp8_param_gather",
    "use_te_rng_tracker": "te_rng_tracker",
}
_CONFIG_FIELDS = {entry.name for entry in dataclasses.fields(MLATransformerConfig)}
# Filled in by validation and training; a file may mention them.
_DERIVED = {
    "params_dtype",
    "pipeline_dtype",
    "autocast_dtype",
    "batch_p2p_comm",
    "deallocate_pipeline_outputs",
    "timers",
    "virtual_pipeline_model_parallel_size",
    "output_layer_init_method",
    "world_size",
    "rank",
    "yaml_cfg",
}


def env_constructor(loader: Any, node: Any) -> str:
    """Replace every ``${NAME}`` of a scalar by the environment variable NAME.

    Raises:
        ConfigError: the variable is not set.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(f"${{{name}}} in the YAML file: the environment variable {name} is not set")
        return os.environ[name]

    return VARIABLE.sub(value, loader.construct_scalar(node))


def load_yaml(yaml_path: str) -> Namespace:
    """Read a file into nested namespaces.

    Raises:
        ConfigError: PyYAML is missing, or the file cannot be read or is not a mapping.
    """
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("--yaml-cfg needs the PyYAML package: pip install pyyaml") from error

    class Loader(yaml.SafeLoader):
        """Safe loading, plus environment variables."""

    Loader.add_implicit_resolver("!environment", re.compile(r".*\$\{[^}]*\}"), None)
    Loader.add_constructor("!environment", env_constructor)
    try:
        with open(yaml_path, encoding="utf-8") as file:
            content = yaml.load(file, Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--yaml-cfg {yaml_path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"--yaml-cfg {yaml_path}: the file must hold keys and values, such as num_layers: 12"
        )
    nested = {key: Namespace(**entry) if isinstance(entry, dict) else entry for key, entry in content.items()}
    loaded = Namespace(**{str(key): entry for key, entry in nested.items()})
    loaded.yaml_cfg = yaml_path
    return loaded


def namespace_from_yaml(command_line: Namespace, parser: argparse.ArgumentParser) -> Namespace:
    """The arguments of ``command_line.yaml_cfg``; all other flags are dropped with a warning.

    Raises:
        ArgumentsError: keys or values that cannot be used, and every rule that the rest breaks.
    """
    dropped = [name for name in command_line.given_flags if name != "--yaml-cfg"]
    if dropped and command_line.rank == 0:
        print(f"WARNING: --yaml-cfg replaces the command line; dropped: {' '.join(dropped)}", flush=True)
    args = parser.parse_args([])
    args.rank, args.world_size = command_line.rank, command_line.world_size
    args.yaml_cfg = command_line.yaml_cfg
    _fill(args, load_yaml(command_line.yaml_cfg))
    return args


def _fill(args: Namespace, loaded: Namespace) -> None:
    """Copy what a file says into ``args``, whose other attributes are the defaults."""
    pairs, unknown, problems = _flatten(loaded)
    tainted = {problem.flag for problem in problems}
    given = []
    for dest, value in pairs.items():
        flag = FLAG_OF_DEST.get(dest)
        if flag is None:
            setattr(args, dest, value)
            continue
        try:
            setattr(args, dest, _convert(flag, value))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            problems.append(Problem(flag.name, value, f"{dest} in the YAML file: {error}", usage=True))
            tainted.add(flag.name)
        if dest == "ckpt_format" or getattr(args, dest) != flag.default:
            given.append(flag.name)
    args.given_flags = tuple(given)
    if problems:
        rules = [problem for problem in find_problems(deepcopy(args)) if problem.flag not in tainted]
        raise ArgumentsError([*problems, *rules])
    if args.rank == 0:
        for name in unknown:
            print(f"WARNING: {name} in the YAML file is not an argument; it is kept as it is", flush=True)


def _flatten(loaded: Namespace) -> tuple[Pairs, list[str], list[Problem]]:
    """(attributes by name, names that are no arguments, problems) of a loaded file."""
    pairs: Pairs = {}
    unknown: list[str] = []
    problems: list[Problem] = []
    for key, value in vars(loaded).items():
        if key in SECTIONS:
            continue
        _place(key, value, pairs, unknown, problems)
    for section in SECTIONS:
        for key, value in vars(getattr(loaded, section, Namespace())).items():
            _place(key, value, pairs, unknown, problems)
    return pairs, unknown, problems


def _place(key: str, value: Any, pairs: Pairs, unknown: list[str], problems: list[Problem]) -> None:
    """Put one key of a file where it belongs."""
    if key in TRANSLATED:
        try:
            pairs.update(TRANSLATED[key](value))
        except (TypeError, ValueError) as error:
            problems.append(Problem(key, value, f"in the YAML file: {error}", usage=True))
    elif key in _RENAMED:
        pairs[_RENAMED[key]] = value
    elif key in FLAG_OF_DEST:
        pairs[key] = value
        if key == "num_query_groups" and value is not None:
            pairs.setdefault("group_query_attention", True)
    elif key in _CONFIG_FIELDS and key not in _DERIVED:
        if value is not None:
            pairs[key] = value
    elif key not in _DERIVED and value is not None:
        near = suggestion(key, FLAG_OF_DEST)
        if near:
            problems.append(Problem(key, None, f"in the YAML file: no such argument{near}", usage=True))
        else:
            unknown.append(key)
            pairs[key] = value


def _activation(name: str | None) -> Pairs:
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"is not one of {', '.join(ACTIVATIONS)}{suggestion(name, ACTIVATIONS)}")
    switch = None if name is None else ACTIVATIONS.get(name)
    return {switch: True} if switch else {}


def _initialiser(name: str | None) -> Pairs:
    if name not in (None, "xavier_uniform"):
        raise ValueError("leave it empty, or use xavier_uniform")
    return {"init_method_xavier_uniform": True} if name else {}


def _window(window: Any) -> Pairs:
    if window is None:
        return {}
    left, right = window
    return {"pre_tockens": left, "next_tockens": right}


def _negated(dest: str) -> Callable[[Any], Pairs]:
    return lambda value: {dest: not value}


TRANSLATED: dict[str, Callable[[Any], Pairs]] = {
    "activation_func": _activation,
    "init_method": _initialiser,
    "window_size": _window,
    "persist_layer_norm": _negated("no_persist_layer_norm"),
    "bias_activation_fusion": lambda on: {"bias_gelu_fusion": on, "bias_swiglu_fusion": on},
}


def _convert(flag: Flag, value: Any) -> Any:
    """The value as the flag would have parsed it; a number may be written as text."""
    if value is None or value == flag.default:
        return value
    if flag.options.get("action"):
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return value
    if flag.options.get("nargs"):
        words = value.split() if isinstance(value, str) else value
        return [_convert_one(flag, word) for word in (words if isinstance(words, list) else [words])]
    return _convert_one(flag, value)


def _convert_one(flag: Flag, value: Any) -> Any:
    kind = flag.options.get("type", str)
    if kind is int and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value!r} is not a whole number")
    if kind in (int, float) and isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    converted = kind(value)
    choices = flag.options.get("choices")
    if choices is not None and converted not in choices:
        named = [choice for choice in choices if choice is not None]
        raise ValueError(f"{value} is not one of {', '.join(map(str, named))}{suggestion(value, named)}")
    return converted


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def validate_yaml(args: Namespace, defaults: Mapping[str, Any] = {}) -> Namespace:
    """Flatten the sections of a loaded file, if it still has them, then ``validate_args``."""
    if any(hasattr(args, section) for section in SECTIONS):
        loaded = Namespace(**vars(args))
        for name in loaded.__dict__:
            delattr(args, name)
        args.rank, args.world_size = getattr(loaded, "rank", 0), getattr(loaded, "world_size", 1)
        args.yaml_cfg = getattr(loaded, "yaml_cfg", None)
        for flag in ALL_FLAGS:
            if not hasattr(args, flag.dest):
                setattr(args, flag.dest, flag.default)
        _fill(args, loaded)
    return validate_args(args, defaults)


def core_config_from_args(args: Namespace, dataclass: type = TransformerConfig) -> Any:
    """A dataclass filled from the attributes of the same names; absent ones keep their defaults."""
    names = [entry.name for entry in dataclasses.fields(dataclass) if hasattr(args, entry.name)]
    return dataclass(**{name: getattr(args, name) for name in names})


def core_transformer_config_from_yaml(args: Namespace, transfomer_key: str = "language_model") -> Any:
    """The model's config; ``args`` has been validated, so the section is part of it by now."""
    if hasattr(args, transfomer_key):
        args = validate_yaml(deepcopy(args))
    return core_transformer_config_from_args(args)
