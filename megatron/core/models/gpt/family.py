"""GPT as the training loop sees it: its layers, its batch, and the formulas for its cost."""

from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TELinear
from megatron.core.models.family import (
    BatchShape,
    BatchTensor,
    MemoryEstimate,
    ModelFamily,
    ModelShape,
    Stages,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.parameter_count import gpt_parameter_count
from megatron.core.transformer.pipeline_layout import get_num_layers_to_build, get_transformer_layer_offset
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig, moe_layer_pattern


def _token_pairs(batch: BatchShape) -> tuple[int, ...]:
    """[b, 1, s, s]."""
    return batch.sequences, 1, batch.sequence_length, batch.sequence_length


BATCH = {
    "tokens": BatchTensor(torch.int64, Stages.FIRST, embeds_further_tokens=True),
    "labels": BatchTensor(torch.int64, Stages.LAST),
    "loss_mask": BatchTensor(torch.float32, Stages.LAST),
    "attention_mask": BatchTensor(torch.bool, Stages.ALL, _token_pairs, is_attention_mask=True),
    "position_ids": BatchTensor(torch.int64, Stages.FIRST),
}


def layer_spec(
    config: TransformerConfig, with_transformer_engine_names: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layer that the config describes, with the norms inside the linear layers or apart from them.

    Where only some layers have experts, the specs of all layers of this stage.
    """
    if len(set(moe_layer_pattern(config))) > 1:
        return get_gpt_decoder_block_spec(config, with_transformer_engine_names, config.normalization)
    common = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "moe_use_legacy_grouped_gemm": config.moe_use_legacy_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
        "post_norm": config.post_norm,
    }
    if with_transformer_engine_names:
        return get_gpt_layer_with_transformer_engine_spec(**common)
    return get_gpt_layer_local_spec(**common, normalization=config.normalization)


def operations(shape: ModelShape, batch: BatchShape) -> float:
    """Multiply-adds (counted as two) of forward and backward over a batch.

    Matrix products of attention, MLP and logits; causal attention counts half its square; embedding
    look-ups, norms and routing count nothing. With s, h, L, a, g, f, V for sequence, hidden, layers, heads,
    query groups, MLP width, vocabulary, r = kv_channels * a / h and m = 3/2 for gated MLPs (else 1)::

        batch * s * (12 h f m L + 12 L h^2 r (1 + g/a + s/(2h)) + 6 h V (M + 1) + 6 M (3h + 2h^2))

    With latent attention 6 L (weights of the projections + s a (dn + dr + dv) / 2) stands in the middle.
    The factor 12 is 3 passes (forward, input gradient, weight gradient) x 2 products x 2 operations. In a
    layer with experts, f is what one token goes through: k experts of their width, and the shared ones. L
    counts the M layers that predict further tokens; each has logits, a projection and three norms of its own.
    """
    s, h, further = batch.sequence_length, shape.hidden_size, shape.mtp_num_layers
    layers = shape.num_layers + further
    moe_layers = shape.num_moe_layers + further * shape.last_layer_has_experts
    gate = 1.5 if shape.gated_linear_unit else 1.0
    widths = (layers - moe_layers) * shape.ffn_hidden_size
    widths += moe_layers * _width_of_experts(shape, shape.moe_router_topk)
    mlp = 12 * h * gate * widths
    # A query meets half of the keys, in the scores and in the sum of values.
    met = shape.num_attention_heads * sum(_head_widths(shape)) * s / 2
    attention = 6 * layers * (_attention_weights(shape) + met)
    logits = 6 * h * shape.vocab_size * (further + 1)
    return batch.sequences * s * (mlp + attention + logits + 6 * further * (3 * h + 2 * h * h))


def memory(shape: ModelShape, batch: BatchShape) -> MemoryEstimate:
    """Parameters without biases, and activations with selective recompute and sequence parallelism.

    One layer keeps s·b·h·(18 + 4f/h) bytes: Korthikanti et al., "Reducing Activation Recomputation in Large
    Transformer Models", section 5, for an MLP of width f instead of 4h.
    """
    tokens, h = batch.sequences * batch.sequence_length, shape.hidden_size
    key_width, value_width = (shape.num_attention_heads * width for width in _head_widths(shape))
    if shape.latent is None:
        keys_and_values = 2 * shape.num_query_groups * shape.kv_channels
    else:
        keys_and_values = key_width + value_width
    dense, mixed, experts = (
        _layer_weights(shape, moe=False),
        _layer_weights(shape, moe=True),
        _expert_weights(shape),
    )
    block = (shape.num_layers - shape.num_moe_layers) * dense + shape.num_moe_layers * mixed
    block += (
        shape.num_layers * 4 * h + 2 * h
    )  # two norms with scale and shift in each layer, and the final one
    return MemoryEstimate(
        layer_weights=min(dense, mixed - experts) if shape.num_moe_layers else dense,
        block_parameters=block,
        table_parameters=h * shape.vocab_size,
        layer_activations=tokens * h * (18 + 4 * shape.ffn_hidden_size / h),
        # Ids of 8 bytes, and the mask of the embedding's dropout.
        input_activations=8 * tokens + tokens * h,
        # The input of the output layer, and the logits, kept as fp32 for the loss.
        output_activations=(1 + shape.mtp_num_layers) * tokens * h * 4 * (1 + shape.vocab_size / h),
        residual_stream=tokens * h,
        # Queries, keys, values and the result.
        attention_tensors=tokens * (key_width + keys_and_values + value_width),
        mlp_activations=tokens * _narrowest_mlp(shape),
        # Of queries, keys and values; of the projection; and of the two layers of the MLP.
        linear_inputs=tokens * (2 * h + value_width + shape.ffn_hidden_size),
        logits=tokens * shape.vocab_size,
        expert_parameters=shape.num_moe_layers * experts,
        # A layer, the projection of two states to one, and three norms with scale and shift.
        mtp_parameters=shape.mtp_num_layers
        * (_layer_weights(shape, moe=shape.last_layer_has_experts) + 2 * h * h + (4 + 6) * h),
        mtp_expert_parameters=shape.mtp_num_layers * shape.last_layer_has_experts * experts,
    )


def _layer_weights(shape: ModelShape, moe: bool) -> float:
    """Weights of the linear layers in one layer: attention's, and 2hf·m of the MLP (m = 3/2 if gated)."""
    gate = 1.5 if shape.gated_linear_unit else 1.0
    width = shape.ffn_hidden_size
    if moe:
        width = _width_of_experts(shape, shape.num_moe_experts or 0)
    return _attention_weights(shape) + 2 * shape.hidden_size * gate * width


def _attention_weights(shape: ModelShape) -> float:
    """Weights of attention's projections: 2hd(a + g), or those to and from latents.

    The vectors of the latents' norms are counted with them, as the original counts them.
    """
    h, heads, latent = shape.hidden_size, shape.num_attention_heads, shape.latent
    if latent is None:
        return 2 * h * shape.kv_channels * (heads + shape.num_query_groups)
    rank, turned = latent.kv_lora_rank, latent.qk_pos_emb_head_dim
    query_width = heads * (latent.qk_head_dim + turned)
    query = h * query_width
    if latent.q_lora_rank is not None:
        query = latent.q_lora_rank * (h + query_width + 1)
    expanded = heads * (latent.qk_head_dim + latent.v_head_dim)
    return query + rank * (h + expanded + 1) + h * turned + heads * latent.v_head_dim * h


def _head_widths(shape: ModelShape) -> tuple[int, int]:
    """Of a head's query and key, and of its value."""
    if shape.latent is None:
        return shape.kv_channels, shape.kv_channels
    return shape.latent.qk_head_dim + shape.latent.qk_pos_emb_head_dim, shape.latent.v_head_dim


def _narrowest_mlp(shape: ModelShape) -> int:
    """Inner width of a dense layer's MLP, or of the shared experts where all layers have experts."""
    if shape.num_moe_layers < shape.num_layers:
        return shape.ffn_hidden_size
    return shape.moe_shared_expert_intermediate_size or 0


def _expert_weights(shape: ModelShape) -> float:
    """Weights of all routed experts of a layer."""
    width = shape.moe_ffn_hidden_size or shape.ffn_hidden_size
    return (3 if shape.gated_linear_unit else 2) * shape.hidden_size * (shape.num_moe_experts or 0) * width


def _width_of_experts(shape: ModelShape, experts: int) -> int:
    """Inner widths of so many experts, and of the shared ones."""
    width = shape.moe_ffn_hidden_size or shape.ffn_hidden_size
    return experts * width + (shape.moe_shared_expert_intermediate_size or 0)


def parameters(model: Any) -> int | None:
    """Number of parameters of this rank's part of a GPT, while it is the part being built, by formula."""
    if type(model) is not GPTModel:
        return None
    return gpt_parameter_count(
        model.config,
        model.vocab_size,
        model.max_sequence_length,
        model.position_embedding_type,
        model.share_embeddings_and_output_weights,
        tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        expert_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        first_layer=get_transformer_layer_offset(model.config),
        num_layers=get_num_layers_to_build(model.config),
        has_embedding=model.pre_process,
        has_output=model.post_process,
        splits_latents=not any(isinstance(module, TELinear) for module in model.modules()),
    )


GPT = ModelFamily(
    name="gpt",
    batch=BATCH,
    layer_spec=layer_spec,
    operations=operations,
    memory=memory,
    parameters=parameters,
)
