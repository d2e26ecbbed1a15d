"""The model family of a run, and the sizes that its formulas take, from the arguments."""

from argparse import Namespace
from dataclasses import fields

from megatron.core.models.family import (
    BatchShape,
    LatentShape,
    MemoryEstimate,
    ModelFamily,
    ModelShape,
    get_model_family,
)

# Of scripts that do not say which.
DEFAULT_FAMILY = "gpt"

# Arguments each of which gives the MLP a gate.
_GATES = ("swiglu", "geglu", "gelu_tanh", "glu_gate_last")


def is_gated(args: Namespace) -> bool:
    """Whether the first layer of an MLP gives two halves, one of them activated."""
    return any(getattr(args, gate, False) for gate in _GATES)


def model_family(args: Namespace) -> ModelFamily:
    """The family that the entry point named to ``pretrain``."""
    return get_model_family(getattr(args, "model_family", DEFAULT_FAMILY))


def model_shape(args: Namespace) -> ModelShape:
    """Sizes of the model. Flags about experts are read only where there are some."""
    experts = {}
    if getattr(args, "num_experts", None):
        pattern = _moe_layer_pattern(args)
        experts = {
            "num_moe_layers": sum(pattern),
            "last_layer_has_experts": pattern[-1],
            "num_moe_experts": args.num_experts,
            "moe_ffn_hidden_size": args.moe_ffn_hidden_size,
            "moe_router_topk": args.moe_router_topk,
            "moe_shared_expert_intermediate_size": args.moe_shared_expert_intermediate_size,
        }
    latent = None
    if getattr(args, "multi_latent_attention", False):
        latent = LatentShape(**{entry.name: getattr(args, entry.name) for entry in fields(LatentShape)})
    return ModelShape(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
        kv_channels=args.kv_channels,
        gated_linear_unit=is_gated(args),
        vocab_size=args.padded_vocab_size or 0,
        latent=latent,
        mtp_num_layers=getattr(args, "mtp_num_layers", None) or 0,
        **experts,
    )


def batch_shape(args: Namespace, sequences: int) -> BatchShape:
    """Sizes of a batch of so many sequences."""
    return BatchShape(sequences, args.seq_length, getattr(args, "decoder_seq_length", None))


def memory_estimate(args: Namespace) -> MemoryEstimate:
    """What the formulas of the family say of the model and one micro-batch; all ranks together."""
    return model_family(args).memory(model_shape(args), batch_shape(args, args.micro_batch_size))


def _moe_layer_pattern(args: Namespace) -> list[bool]:
    """Which layers have experts: every ``moe_layer_freq``-th from the first on, or the ones of a list."""
    if isinstance(args.moe_layer_freq, list):
        return [bool(chosen) for chosen in args.moe_layer_freq]
    return [layer % args.moe_layer_freq == 0 for layer in range(args.num_layers)]
