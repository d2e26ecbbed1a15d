"""The rules of a transformer's config: small functions that give a sentence for each broken rule."""

from collections.abc import Iterable

import torch.nn.functional as F

from megatron.core.errors import NotBuiltYetError
from megatron.core.transformer.config_fields import TransformerFields

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


def refuse_unbuilt(config: TransformerFields) -> None:
    """Raises NotBuiltYetError for the first field that asks for what does not exist."""
    for field, feature in UNBUILT.items():
        value = getattr(config, field)
        if value:
            raise NotBuiltYetError(feature, f"{field}={value!r}", f"Leave {field} out.")


def transformer_problems(config: TransformerFields) -> list[str]:
    """Every broken rule of ``config``: what was set, and what to set instead."""
    groups = (_precision, _attention, _scales, _mlp, _recompute, _pipeline_layout, _context_parallel)
    groups += (_further_tokens, _moe)
    return [sentence for group in groups for sentence in broken(group(config))]


def broken(rules: Rules) -> list[str]:
    """The sentences of the broken ones."""
    return [sentence for is_broken, sentence in rules if is_broken]


def _precision(c: TransformerFields) -> Rules:
    yield c.fp16 and c.bf16, "fp16 and bf16 are both set: keep one"
    yield (
        c.normalization not in NORMALIZATIONS,
        f"normalization: {c.normalization!r} is not one of {', '.join(NORMALIZATIONS)}",
    )


def _attention(c: TransformerFields) -> Rules:
    heads, groups, tp = c.num_attention_heads, c.num_query_groups, c.tensor_model_parallel_size
    if heads and groups is not None:
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
    yield from _latent_attention(c)


def _scales(c: TransformerFields) -> Rules:
    factor = c.embedding_multiplier_scale
    yield factor <= 0, f"embedding_multiplier_scale: {factor}; it must be positive, 1 changes nothing"
    for name in ("output_multiplier_scale", "attn_logit_softcapping", "output_logit_softcapping"):
        number = getattr(c, name)
        yield number is not None and number <= 0, f"{name}: {number}; it must be positive, or None for none"


def _latent_attention(c: TransformerFields) -> Rules:
    if not c.multi_latent_attention:
        return
    yield (
        c.rotary_interleaved,
        "rotary_interleaved: multi_latent_attention has its own order of rotary pairs; leave it off",
    )
    yield (
        c.apply_rope_fusion,
        "apply_rope_fusion: not available with multi_latent_attention; leave it off",
    )


def _mlp(c: TransformerFields) -> Rules:
    fused_activations = (F.gelu, F.silu)
    name = getattr(c.activation_func, "__name__", c.activation_func)
    yield (
        c.bias_activation_fusion and c.activation_func not in fused_activations,
        f"bias_activation_fusion: only for gelu and silu, activation_func is {name}; leave it off",
    )
    yield (
        c.bias_activation_fusion
        and c.activation_func is F.gelu
        and not c.gated_linear_unit
        and not c.add_bias_linear,
        "bias_activation_fusion: gelu without linear bias has no bias to fuse; leave it off",
    )
    yield (
        c.glu_gate_last and not c.gated_linear_unit,
        "glu_gate_last: set gated_linear_unit=True as well",
    )


def _recompute(c: TransformerFields) -> Rules:
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
    modules = c.recompute_modules or []
    unknown = [name for name in modules if name not in RECOMPUTE_MODULES]
    yield unknown, f"recompute_modules: {', '.join(unknown)} not among {', '.join(RECOMPUTE_MODULES)}"
    if granularity == "selective":
        yield (
            "moe_act" in modules and not c.moe_grouped_gemm,
            "recompute_modules moe_act: set moe_grouped_gemm=True as well",
        )
        yield (
            "mla_up_proj" in modules and not c.multi_latent_attention,
            "recompute_modules mla_up_proj: this model has no multi_latent_attention; leave it out",
        )
    yield (
        c.moe_layer_recompute and granularity == "full",
        "moe_layer_recompute: recompute_granularity full covers the experts; leave it off",
    )


def _pipeline_layout(c: TransformerFields) -> Rules:
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


def _context_parallel(c: TransformerFields) -> Rules:
    kinds = c.cp_comm_type
    yield (
        isinstance(kinds, list) and c.context_parallel_size > 1 and len(kinds) != c.num_layers,
        f"cp_comm_type: {len(kinds) if isinstance(kinds, list) else 1} words for {c.num_layers} layers; "
        "give one word, or one per layer",
    )


def _further_tokens(c: TransformerFields) -> Rules:
    depths, factor = c.mtp_num_layers or 0, c.mtp_loss_scaling_factor
    yield depths < 0, f"mtp_num_layers: {depths}; it must be at least 1, or None"
    yield depths > 0 and factor is None, "mtp_loss_scaling_factor: needed with mtp_num_layers; set it to 0.1"
    yield factor is not None and factor < 0, f"mtp_loss_scaling_factor: {factor}; it must be at least 0"


def _moe(c: TransformerFields) -> Rules:
    experts = c.num_moe_experts
    if experts is None:
        yield (
            c.expert_model_parallel_size > 1,
            f"expert_model_parallel_size {c.expert_model_parallel_size}: set num_moe_experts as well",
        )
        return
    yield experts <= 0, f"num_moe_experts: {experts}; it must be positive, or None for a dense model"
    yield c.add_bias_linear, "num_moe_experts: experts have no biases; set add_bias_linear=False"
    yield from _moe_parts(c, experts)
    yield from _moe_capacity(c)
    yield from _moe_dispatch(c)
    yield from _moe_routing(c, experts)


def _moe_parts(c: TransformerFields, experts: int) -> Rules:
    """How experts divide among ranks and layers."""
    ep, etp, width = (
        c.expert_model_parallel_size,
        c.expert_tensor_parallel_size or 1,
        c.moe_ffn_hidden_size or 0,
    )
    yield experts % ep, f"num_moe_experts {experts} is not divisible by expert_model_parallel_size {ep}"
    yield width % etp, f"moe_ffn_hidden_size {width} is not divisible by expert_tensor_parallel_size {etp}"
    yield (
        (c.moe_shared_expert_intermediate_size or 0) % c.tensor_model_parallel_size,
        f"moe_shared_expert_intermediate_size {c.moe_shared_expert_intermediate_size} is not divisible by "
        f"tensor_model_parallel_size {c.tensor_model_parallel_size}",
    )
    frequency = c.moe_layer_freq
    yield (
        isinstance(frequency, int) and frequency < 1,
        f"moe_layer_freq: {frequency}; set it to 1 or more, or to a list of 0 and 1 for each layer",
    )
    yield (
        not isinstance(frequency, int) and len(frequency) != c.num_layers,
        f"moe_layer_freq: {frequency} for {c.num_layers} layers; give 0 or 1 for each layer",
    )
    yield (
        not isinstance(frequency, int) and any(chosen not in (0, 1) for chosen in frequency),
        f"moe_layer_freq: {frequency} has other entries than 0 and 1",
    )
    yield (
        c.moe_apply_probs_on_input and c.moe_router_topk != 1,
        f"moe_apply_probs_on_input: moe_router_topk is {c.moe_router_topk}; it goes with 1",
    )
    yield (
        c.moe_shared_expert_gate and c.moe_shared_expert_intermediate_size is None,
        "moe_shared_expert_gate: set moe_shared_expert_intermediate_size as well",
    )


def _moe_capacity(c: TransformerFields) -> Rules:
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


def _moe_dispatch(c: TransformerFields) -> Rules:
    dispatcher = c.moe_token_dispatcher_type
    yield (
        c.moe_shared_expert_overlap and dispatcher == "allgather",
        "moe_shared_expert_overlap: moe_token_dispatcher_type is allgather; use alltoall",
    )
    yield (
        dispatcher == "allgather" and c.variable_seq_lengths,
        "variable_seq_lengths: not with moe_token_dispatcher_type allgather; use alltoall",
    )


def _moe_routing(c: TransformerFields, experts: int) -> Rules:
    yield (
        c.moe_router_enable_expert_bias and c.moe_router_score_function != "sigmoid",
        "moe_router_enable_expert_bias: set moe_router_score_function='sigmoid'",
    )
    kind, topk = c.moe_router_load_balancing_type, c.moe_router_topk
    yield (
        c.moe_router_enable_expert_bias and kind not in ("aux_loss", "seq_aux_loss", "none"),
        f"moe_router_enable_expert_bias: moe_router_load_balancing_type {kind} chooses without a bias; set "
        "it to none",
    )
    yield (
        topk == 1
        and c.moe_router_score_function == "softmax"
        and not c.moe_router_pre_softmax
        and kind in ("aux_loss", "seq_aux_loss", "none"),
        "moe_router_topk 1: a softmax over one score is always 1; set moe_router_pre_softmax=True",
    )
    yield (
        experts > 0 and not 1 <= topk <= experts,
        f"moe_router_topk {topk}: choose 1 to {experts} experts a token",
    )
    yield (
        kind == "sinkhorn" and c.moe_aux_loss_coeff,
        "moe_aux_loss_coeff: sinkhorn routing is even by itself; set it to 0",
    )
    yield from _moe_groups(c, experts)


def _moe_groups(c: TransformerFields, experts: int) -> Rules:
    """Groups of experts to which a token's choice is limited."""
    groups, kept, topk = c.moe_router_num_groups, c.moe_router_group_topk, c.moe_router_topk
    greedy = c.moe_router_load_balancing_type == "group_limited_greedy"
    if greedy:
        groups = groups or c.expert_model_parallel_size
        yield not kept, "moe_router_load_balancing_type group_limited_greedy: set moe_router_group_topk"
    yield kept is not None and not groups, "moe_router_group_topk: set moe_router_num_groups as well"
    if not groups:
        return
    yield experts % groups, f"num_moe_experts {experts} is not divisible by moe_router_num_groups {groups}"
    if not kept:
        return
    yield kept > groups, f"moe_router_group_topk {kept} exceeds moe_router_num_groups {groups}"
    yield (
        topk > kept * (experts // groups),
        f"moe_router_topk {topk}: {kept} groups of {experts // groups} experts have fewer",
    )
    yield (
        not greedy and topk < kept <= groups,
        f"moe_router_group_topk {kept} exceeds moe_router_topk {topk}: a token cannot use more groups",
    )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
