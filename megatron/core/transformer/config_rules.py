"""The rules a TransformerConfig must obey: small functions that return a sentence per broken rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch.nn.functional as F

from megatron.core.errors import NotBuiltYetError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe")
ATTENTION_LAYOUTS = ("SBH", "BSH")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")

# Field -> what it would switch on. The command line takes some of their flags and says that they do nothing;
# a config of one's own must not be silent about it.
UNBUILT = {
    "fp8": "fp8 arithmetic",
    "fp8_param": "weights in fp8",
    "fp8_dot_product_attention": "attention in fp8",
    "fp8_multi_head_attention": "attention in fp8",
    "cpu_offloading": "keeping activations on the host",
    "enable_cuda_graph": "capturing layers as graphs",
    "external_cuda_graph": "capturing layers as graphs",
    "flash_decode": "a kernel for decoding",
    "heterogeneous_block_specs": "layers of different kinds",
}

# (condition under which the rule is broken, sentence)
Rules = Iterable[tuple[object, str]]


def refuse_unbuilt(config: TransformerConfig) -> None:
    """Raises NotBuiltYetError for the first field that asks for what does not exist."""
    for field, feature in UNBUILT.items():
        value = getattr(config, field)
        if value:
            raise NotBuiltYetError(feature, f"{field}={value!r}", f"Leave {field} out.")


def transformer_problems(config: TransformerConfig) -> list[str]:
    """Every broken rule of ``config``: what was set, and what to set instead."""
    groups = (_precision, _attention, _mlp, _recompute, _pipeline_layout, _context_parallel, _moe)
    return [sentence for group in groups for broken, sentence in group(config) if broken]


def _precision(c: TransformerConfig) -> Rules:
    yield c.fp16 and c.bf16, "fp16 and bf16 are both set: keep one"
    yield (
        c.normalization not in NORMALIZATIONS,
        f"normalization: {c.normalization!r} is not one of {', '.join(NORMALIZATIONS)}",
    )


def _attention(c: TransformerConfig) -> Rules:
    heads, groups, tp = c.num_attention_heads, c.num_query_groups, c.tensor_model_parallel_size
    if heads:
        yield heads % tp, f"num_attention_heads {heads} is not divisible by tensor_model_parallel_size {tp}"
        yield (
            groups < 1 or heads % groups,
            f"num_query_groups {groups} does not divide num_attention_heads {heads}: use one of "
            f"{_divisors(heads)}",
        )
        yield groups % tp, f"num_query_groups {groups} is not divisible by tensor_model_parallel_size {tp}"
    yield (
        c.attention_layout not in ATTENTION_LAYOUTS,
        f"attention_layout: {c.attention_layout!r} is not one of {', '.join(ATTENTION_LAYOUTS)}",
    )
    yield (
        c.window_size is not None and (len(c.window_size) != 2 or any(side < -1 for side in c.window_size)),
        f"window_size: {c.window_size} must be (left, right) with numbers of tokens >= 0, or -1 for no limit",
    )
    yield (
        c.multi_latent_attention and c.rotary_interleaved,
        "rotary_interleaved: multi_latent_attention has its own order of rotary pairs; leave it off",
    )
    yield (
        c.multi_latent_attention and c.apply_rope_fusion,
        "apply_rope_fusion: not available with multi_latent_attention; leave it off (--no-rope-fusion)",
    )


def _mlp(c: TransformerConfig) -> Rules:
    fused_activations = (F.gelu, F.silu)
    name = getattr(c.activation_func, "__name__", c.activation_func)
    yield (
        c.bias_activation_fusion and c.activation_func not in fused_activations,
        f"bias_activation_fusion: only for gelu and silu, activation_func is {name}; "
        "leave it off (--no-bias-gelu-fusion)",
    )
    yield (
        c.bias_activation_fusion
        and c.activation_func is F.gelu
        and not c.gated_linear_unit
        and not c.add_bias_linear,
        "bias_activation_fusion: gelu without linear bias has no bias to fuse; "
        "leave it off (--no-bias-gelu-fusion)",
    )
    yield (
        c.glu_gate_last and not c.gated_linear_unit,
        "glu_gate_last: set gated_linear_unit=True as well",
    )


def _recompute(c: TransformerConfig) -> Rules:
    granularity, method, layers = c.recompute_granularity, c.recompute_method, c.recompute_num_layers
    yield (
        granularity not in (None, "full", "selective"),
        f"recompute_granularity: {granularity!r} is not full or selective",
    )
    yield (
        granularity == "full" and method not in ("block", "uniform"),
        f"recompute_method: {method!r} with recompute_granularity full; set it to uniform or block",
    )
    yield (
        granularity == "full" and layers is None,
        "recompute_num_layers: unset with recompute_granularity full; set it to 1 or more",
    )
    yield (
        granularity == "full" and layers is not None and layers < 1,
        f"recompute_num_layers: {layers}; set it to 1 or more",
    )
    yield (
        granularity == "selective" and layers is not None,
        f"recompute_num_layers: {layers} has no meaning with recompute_granularity selective; leave it unset",
    )
    yield (
        c.distribute_saved_activations and c.sequence_parallel,
        "distribute_saved_activations: sequence_parallel splits them already; leave one of the two off",
    )
    unknown = [name for name in c.recompute_modules if name not in RECOMPUTE_MODULES]
    yield unknown, f"recompute_modules: {', '.join(unknown)} not among {', '.join(RECOMPUTE_MODULES)}"
    if granularity == "selective":
        yield (
            "moe_act" in c.recompute_modules and not c.moe_grouped_gemm,
            "recompute_modules moe_act: set moe_grouped_gemm=True as well",
        )
        yield (
            "mla_up_proj" in c.recompute_modules and not c.multi_latent_attention,
            "recompute_modules mla_up_proj: this model has no multi_latent_attention; leave it out",
        )
    yield (
        c.moe_layer_recompute and granularity == "full",
        "moe_layer_recompute: recompute_granularity full covers the experts; leave it off",
    )


def _pipeline_layout(c: TransformerConfig) -> Rules:
    uneven = (
        c.num_layers_in_first_pipeline_stage is not None or c.num_layers_in_last_pipeline_stage is not None
    )
    yield (
        uneven and (c.account_for_embedding_in_pipeline_split or c.account_for_loss_in_pipeline_split),
        "num_layers_in_first/last_pipeline_stage: not together with "
        "account_for_embedding/loss_in_pipeline_split",
    )
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        count = getattr(c, name)
        yield count is not None and count <= 0, f"{name}: {count}; it must be at least 1"


def _context_parallel(c: TransformerConfig) -> Rules:
    kinds = c.cp_comm_type
    yield (
        isinstance(kinds, list) and c.context_parallel_size > 1 and len(kinds) != c.num_layers,
        f"cp_comm_type: {len(kinds) if isinstance(kinds, list) else 1} words for {c.num_layers} layers; "
        "give one word, or one per layer",
    )


def _moe(c: TransformerConfig) -> Rules:
    experts = c.num_moe_experts
    if experts is None:
        yield (
            c.expert_model_parallel_size > 1,
            f"expert_model_parallel_size {c.expert_model_parallel_size}: set num_moe_experts as well",
        )
        return
    yield experts <= 0, f"num_moe_experts: {experts}; it must be positive, or None for a dense model"
    yield c.add_bias_linear, "num_moe_experts: experts have no biases; set add_bias_linear=False"
    yield from _moe_capacity(c)
    yield from _moe_dispatch(c)
    yield from _moe_routing(c, experts)


def _moe_capacity(c: TransformerConfig) -> Rules:
    balancing = ("aux_loss", "seq_aux_loss", "none")
    capped = c.moe_expert_capacity_factor is not None
    yield (
        capped and c.moe_router_load_balancing_type not in balancing,
        f"moe_expert_capacity_factor: needs moe_router_load_balancing_type {', '.join(balancing)}, "
        f"not {c.moe_router_load_balancing_type}",
    )
    yield (
        c.moe_pad_expert_input_to_capacity and not capped,
        "moe_pad_expert_input_to_capacity: set moe_expert_capacity_factor as well",
    )
    yield (
        c.moe_pad_expert_input_to_capacity and c.moe_token_dispatcher_type == "flex",
        "moe_pad_expert_input_to_capacity: not with moe_token_dispatcher_type flex; use alltoall",
    )


def _moe_dispatch(c: TransformerConfig) -> Rules:
    dispatcher = c.moe_token_dispatcher_type
    yield (
        c.moe_shared_expert_overlap and dispatcher != "alltoall",
        f"moe_shared_expert_overlap: moe_token_dispatcher_type is {dispatcher}; use alltoall",
    )
    yield (
        dispatcher == "alltoall_seq" and c.expert_tensor_parallel_size != c.tensor_model_parallel_size,
        "moe_token_dispatcher_type alltoall_seq: expert_tensor_parallel_size "
        f"{c.expert_tensor_parallel_size} must "
        f"equal tensor_model_parallel_size {c.tensor_model_parallel_size}, or use alltoall",
    )
    yield (
        dispatcher == "alltoall_seq" and c.moe_permute_fusion,
        "moe_permute_fusion: not with moe_token_dispatcher_type alltoall_seq; use alltoall or leave it off",
    )
    yield (
        dispatcher in ("allgather", "alltoall_seq") and c.variable_seq_lengths,
        f"variable_seq_lengths: not with moe_token_dispatcher_type {dispatcher}; use alltoall",
    )


def _moe_routing(c: TransformerConfig, experts: int) -> Rules:
    groups, kept = c.moe_router_num_groups, c.moe_router_group_topk
    yield (
        c.moe_router_enable_expert_bias and c.moe_router_score_function != "sigmoid",
        "moe_router_enable_expert_bias: set moe_router_score_function='sigmoid'",
    )
    yield (
        c.moe_router_topk == 1
        and c.moe_router_score_function == "softmax"
        and not c.moe_router_pre_softmax
        and c.moe_router_load_balancing_type != "sinkhorn",
        "moe_router_topk 1: a softmax over one score is always 1; set moe_router_pre_softmax=True",
    )
    yield kept is not None and not groups, "moe_router_group_topk: set moe_router_num_groups as well"
    if groups:
        yield (
            experts % groups,
            f"num_moe_experts {experts} is not divisible by moe_router_num_groups {groups}",
        )
        yield (
            kept is not None and kept > groups,
            f"moe_router_group_topk {kept} exceeds moe_router_num_groups {groups}",
        )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
