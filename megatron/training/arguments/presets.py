"""``--grok-preset``: the flags of a published Grok-1, for whatever the command line leaves open."""

import math
from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any

from megatron.training.arguments.flags import ALL_FLAGS

# Argument -> value, or what makes it of the arguments before it.
Values = Mapping[str, Any]


def _root_of_width(args: Namespace) -> float:
    """78.38367176906169 at the published width of 6144."""
    return math.sqrt(args.hidden_size)


_BOTH: Values = {
    "hidden_size": 6144,
    "ffn_hidden_size": 32768,
    "num_attention_heads": 48,
    "group_query_attention": True,
    "num_query_groups": 8,
    "seq_length": 8192,
    "max_position_embeddings": 8192,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "post_norm": True,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "num_experts": 8,
    "moe_router_topk": 2,
    "embedding_multiplier_scale": _root_of_width,
    "output_multiplier_scale": 0.5773502691896257,
}
PRESETS: Mapping[str, Values] = {
    # ModelLink's pretrain_grok1_40b_ptd.sh: 8 of the 64 layers, with a SiLU gate and without the soft cap.
    "modellink": {
        "num_layers": 8,
        **_BOTH,
        "swiglu": True,
        "untie_embeddings_and_output_weights": True,
        "moe_aux_loss_coeff": 1e-2,
        "init_method_std": 0.01,
    },
    # The layers that xai-org published with the weights.
    "grok1": {
        "num_layers": 64,
        **_BOTH,
        "gelu_tanh": True,
        "attn_logit_softcapping": 30.0,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
    },
}
# Of each group of flags, one given keeps the preset from setting another.
_ALTERNATIVES = (
    ("swiglu", "geglu", "gelu_tanh", "squared_relu", "is_x_model"),
    ("num_layers", "encoder_num_layers"),
    ("seq_length", "encoder_seq_length"),
)


def apply_preset(args: Namespace, given: Collection[str]) -> list[str]:
    """Fills in what the preset says and neither the command line nor a checkpoint has said."""
    values = PRESETS.get(args.grok_preset or "")
    if values is None:
        return []
    flags = {flag.dest: flag for flag in ALL_FLAGS if flag.dest in values}
    decided = {flag.dest for flag in ALL_FLAGS for name in flag.names if name in given}
    for group in _ALTERNATIVES:
        if decided & set(group):
            decided |= set(group)
    words = []
    for dest, value in values.items():
        if dest in decided or getattr(args, dest) != flags[dest].default:
            continue
        found = value(args) if callable(value) else value
        setattr(args, dest, found)
        if found != flags[dest].default:
            words.append(flags[dest].words(found))
    return [f"notice: --grok-preset {args.grok_preset}: {' '.join(words)}"] if words else []
