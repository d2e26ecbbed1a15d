"""How many parameters a GPT has, by formula: a check on what was built."""

from megatron.core.transformer.transformer_config import TransformerConfig


def gpt_parameter_count(
    config: TransformerConfig,
    vocab_size: int,
    max_sequence_length: int,
    position_embedding_type: str = "learned_absolute",
    share_embeddings_and_output_weights: bool = False,
) -> int:
    """Parameters of the whole model, from its shape alone.

    Args:
        config: model config; its tensor- and pipeline-parallel sizes play no part.
        vocab_size: rows of the embedding, padding included.
        max_sequence_length: rows of a learned position table.
        position_embedding_type: only ``learned_absolute`` has parameters.
        share_embeddings_and_output_weights: the output layer has no weight of its own.
    """
    hidden = config.hidden_size
    tables = vocab_size * (1 if share_embeddings_and_output_weights else 2)
    positions = max_sequence_length if position_embedding_type == "learned_absolute" else 0
    layer = _attention(config) + _mlp(config) + 2 * _norm(config, hidden)
    return (tables + positions) * hidden + config.num_layers * layer + _norm(config, hidden)


def _norm(config: TransformerConfig, width: int) -> int:
    """Scale, and for LayerNorm a shift."""
    return width * (2 if config.normalization == "LayerNorm" else 1)


def _attention(config: TransformerConfig) -> int:
    """Projection to queries, keys and values; projection back; norms of query and key heads."""
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    mixed = (heads + 2 * groups) * width
    weights = config.hidden_size * (mixed + heads * width)
    biases = mixed if config.add_bias_linear or config.add_qkv_bias else 0
    biases += config.hidden_size if config.add_bias_linear else 0
    return weights + biases + (2 * _norm(config, width) if config.qk_layernorm else 0)


def _mlp(config: TransformerConfig) -> int:
    """Projection to the inner width (twice with a gate) and back."""
    inner = config.ffn_hidden_size
    first = inner * (2 if config.gated_linear_unit else 1)
    biases = first + config.hidden_size if config.add_bias_linear else 0
    return config.hidden_size * (first + inner) + biases
