"""How many parameters a GPT has, by formula: a check on what was built."""

from megatron.core.transformer.transformer_config import (
    MLATransformerConfig,
    TransformerConfig,
    moe_layer_pattern,
)


def gpt_parameter_count(
    config: TransformerConfig,
    vocab_size: int,
    max_sequence_length: int,
    position_embedding_type: str = "learned_absolute",
    share_embeddings_and_output_weights: bool = False,
    *,
    tensor_parallel_size: int = 1,
    expert_parallel_size: int = 1,
    expert_tensor_parallel_size: int = 1,
    first_layer: int = 0,
    num_layers: int | None = None,
    has_embedding: bool = True,
    has_output: bool = True,
    splits_latents: bool = True,
) -> int:
    """Parameters of the whole model, or of one rank's share of it, from its shape alone.

    Args:
        config: model config; its tensor- and pipeline-parallel sizes play no part.
        vocab_size: rows of the embedding, padding included.
        max_sequence_length: rows of a learned position table.
        position_embedding_type: only ``learned_absolute`` has parameters.
        share_embeddings_and_output_weights: the output layer has no weight of its own, unless the embedding
            is on another stage.
        tensor_parallel_size: ranks among which weights are split.
        expert_parallel_size: ranks among which experts are dealt out.
        expert_tensor_parallel_size: ranks among which the weights of one expert are split.
        first_layer: the first layer of this stage, counted from 0.
        num_layers: layers of this stage; default all from the first one on.
        has_embedding: this is the first stage.
        has_output: this is the last stage, with the layers that predict further tokens.
        splits_latents: projections to the latents of attention are split over ranks as well; in
            TransformerEngine's form every rank has them whole.
    """
    hidden, tp = config.hidden_size, tensor_parallel_size
    further = (config.mtp_num_layers or 0) if has_output else 0
    embeds = has_embedding or further > 0
    tied_here = embeds and share_embeddings_and_output_weights
    rows = vocab_size // tp * (embeds + (has_output and not tied_here))
    if has_embedding and position_embedding_type == "learned_absolute":
        rows += max_sequence_length
    last_layer = config.num_layers if num_layers is None else first_layer + num_layers
    whole = moe_layer_pattern(config)
    pattern = whole[first_layer:last_layer] + whole[-1:] * further
    attention = (
        _latent_attention(config, tp, tp if splits_latents else 1)
        if isinstance(config, MLATransformerConfig)
        else _attention(config, tp)
    )
    layers = len(pattern) * (attention + (4 if config.post_norm else 2) * _norm(config, hidden))
    layers += pattern.count(False) * _mlp(config, tp)
    if any(pattern):
        layers += pattern.count(True) * _moe(config, tp, expert_parallel_size, expert_tensor_parallel_size)
    # Before a layer that predicts a further token: two norms and the projection of both to one state; a norm
    # behind it.
    layers += further * (2 * hidden * (hidden // tp) + 3 * _norm(config, hidden))
    return rows * hidden + layers + (_norm(config, hidden) if has_output else 0)


def _norm(config: TransformerConfig, width: int) -> int:
    """Scale, and for LayerNorm a shift."""
    return width * (2 if config.normalization == "LayerNorm" else 1)


def _attention(config: TransformerConfig, tp: int) -> int:
    """Projection to queries, keys and values; projection back; norms of query and key heads (all ranks)."""
    groups, width = config.num_query_groups, config.kv_channels
    assert groups is not None and width is not None, "the config fills them in"
    heads, groups = config.num_attention_heads // tp, groups // tp
    mixed = (heads + 2 * groups) * width
    weights = config.hidden_size * (mixed + heads * width)
    biases = mixed if config.add_bias_linear or config.add_qkv_bias else 0
    biases += config.hidden_size if config.add_bias_linear else 0
    return weights + biases + (2 * _norm(config, width) if config.qk_layernorm else 0)


def _latent_attention(config: MLATransformerConfig, tp: int, latent_ranks: int) -> int:
    """Projections to the latents (split over ``latent_ranks``), to the heads, and back; norms of latents."""
    heads, h = config.num_attention_heads // tp, config.hidden_size
    rank_q, rank_kv, turned = config.q_lora_rank, config.kv_lora_rank, config.qk_pos_emb_head_dim
    query = heads * (config.qk_head_dim + turned)
    weights = heads * (config.qk_head_dim + config.v_head_dim) * rank_kv + heads * config.v_head_dim * h
    weights += query * (h if rank_q is None else rank_q)
    weights += ((rank_kv + turned) // latent_ranks + (rank_q or 0) // latent_ranks) * h
    norms = _norm(config, rank_kv) + (0 if rank_q is None else _norm(config, rank_q))
    return weights + (h if config.add_bias_linear else 0) + (norms if config.qk_layernorm else 0)


def _mlp(config: TransformerConfig, tp: int) -> int:
    """Projection to the inner width (twice with a gate) and back, whose bias all ranks have."""
    assert config.ffn_hidden_size is not None, "the config fills it in"
    inner = config.ffn_hidden_size // tp
    first = inner * (2 if config.gated_linear_unit else 1)
    biases = first + config.hidden_size if config.add_bias_linear else 0
    return config.hidden_size * (first + inner) + biases


def _moe(config: TransformerConfig, tp: int, ep: int, etp: int) -> int:
    """Router, this rank's experts, and its part of the shared ones with their gate."""
    assert config.num_moe_experts is not None and config.moe_ffn_hidden_size is not None
    hidden, matrices = config.hidden_size, 3 if config.gated_linear_unit else 2
    weights = config.num_moe_experts * hidden
    weights += config.num_moe_experts // ep * matrices * hidden * (config.moe_ffn_hidden_size // etp)
    shared = config.moe_shared_expert_intermediate_size
    if shared is not None:
        weights += matrices * hidden * (shared // tp) + hidden * config.moe_shared_expert_gate
    return weights
