"""The configs from the arguments: a field takes the argument of its name, or what a table says."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F

from megatron.training.activations import squared_relu
from megatron.training.arguments.flags import INERT_DESTS
from megatron.training.model_family import is_gated


def _activation(args: Namespace) -> Callable[..., torch.Tensor]:
    if args.swiglu:
        return F.silu
    if args.geglu or args.gelu_tanh:
        return F.gelu
    return squared_relu if args.squared_relu else F.gelu


def _activation_fusion(args: Namespace) -> bool:
    """Of GELU this chooses the tanh form."""
    if args.geglu or args.gelu_tanh:
        return args.gelu_tanh
    return args.bias_swiglu_fusion if args.swiglu else args.bias_gelu_fusion


def _initialiser(args: Namespace) -> Callable[..., Any] | None:
    return torch.nn.init.xavier_uniform_ if args.init_method_xavier_uniform else None


def _cp_comm_type(args: Namespace) -> str | list[str]:
    kinds = args.cp_comm_type
    return kinds[0] if isinstance(kinds, list) and len(kinds) == 1 else kinds


# Fields of the config that are not the argument of the same name.
SPECIAL: dict[str, Callable[[Namespace], Any]] = {
    "persist_layer_norm": lambda a: not a.no_persist_layer_norm,
    "layernorm_zero_centered_gamma": lambda a: a.apply_layernorm_1p,
    "layernorm_epsilon": lambda a: a.norm_epsilon,
    "deallocate_pipeline_outputs": lambda a: True,
    "pipeline_dtype": lambda a: a.params_dtype,
    "batch_p2p_comm": lambda a: not a.overlap_p2p_comm,
    "num_moe_experts": lambda a: a.num_experts,
    "num_layers_in_first_pipeline_stage": lambda a: a.decoder_first_pipeline_num_layers,
    "num_layers_in_last_pipeline_stage": lambda a: a.decoder_last_pipeline_num_layers,
    "num_query_groups": lambda a: a.num_query_groups if a.group_query_attention else None,
    "activation_func": _activation,
    "gated_linear_unit": lambda a: is_gated(a) or getattr(a, "gated_linear_unit", False),
    "bias_activation_fusion": _activation_fusion,
    "init_method": _initialiser,
    "output_layer_init_method": _initialiser,
    "cp_comm_type": _cp_comm_type,
    "tp_comm_chunks": lambda a: a.coc_parallel_num if a.use_ascend_coc else 1,
    "tp_comm_fused_matmul": lambda a: a.use_ascend_mc2,
    "mtp_after_norm": lambda a: not getattr(a, "mtp_before_norm", False),
    # On by default, and without a fused form for latent attention's rotation.
    "apply_rope_fusion": lambda a: a.apply_rope_fusion and not a.multi_latent_attention,
    "use_cpu_initialization": lambda a: bool(a.use_cpu_initialization),
}


def core_transformer_config_from_args(args: Namespace, config_class: type | None = None) -> Any:
    """A ``TransformerConfig`` from validated arguments.

    A field takes the argument of the same name unless :data:`SPECIAL` says otherwise.  Flags that are
    accepted without effect never reach the config.

    Args:
        args: validated arguments.
        config_class: another dataclass to fill.

    Raises:
        ConfigError: the config's own rules.
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    if args.multi_latent_attention:
        config_class = MLATransformerConfig
    config_class = config_class or TransformerConfig
    return config_class(**field_values(config_class, args, SPECIAL))


def field_values(
    config_class: type, args: Namespace, special: Mapping[str, Callable[[Namespace], Any]]
) -> dict[str, Any]:
    """Constructor arguments of a config dataclass.

    Flags that are accepted without effect never reach a config, and a field without an argument keeps its
    default.

    Args:
        config_class: the dataclass.
        args: validated arguments.
        special: what makes the fields that are not the argument of the same name.
    """
    values, arguments = {}, vars(args)  # copying a value into a config is no use of the argument
    for entry in fields(config_class):
        if entry.name in special:
            values[entry.name] = special[entry.name](args)
        elif entry.name in arguments and entry.name not in INERT_DESTS:
            values[entry.name] = arguments[entry.name]
    return values
