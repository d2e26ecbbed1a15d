"""How many parameters a GPT has, by formula: a check on what was built."""

from megatron.core.transformer.transformer_config import TransformerConfig


def gpt_parameter_count(
    config: TransformerConfig,
    vocab_size: int,
    max_sequence_length: int,
    position_embedding_type: str = "learned_absolute",
    share_embeddings_and_output_weights: bool = False,
    *,
    tensor_parallel_size: int = 1,
    num_layers: int | None = None,
    has_embedding: bool = True,
    has_output: bool = True,
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
        num_layers: layers of this stage; default all of them.
        has_embedding: this is the first stage.
        has_output: this is the last stage.
    """
    hidden, tp = config.hidden_size, tensor_parallel_size
    tied_here = has_embedding and share_embeddings_and_output_weights
    rows = vocab_size // tp * (has_embedding + (has_output and not tied_here))
    if has_embedding and position_embedding_type == "learned_absolute":
        rows += max_sequence_length
    layers = config.num_layers if num_layers is None else num_layers
    layer = _attention(config, tp) + _mlp(config, tp) + 2 * _norm(config, hidden)
    return rows * hidden + layers * layer + (_norm(config, hidden) if has_output else 0)


def _norm(config: TransformerConfig, width: int) -> int:
    """Scale, and for LayerNorm a shift."""
    return width * (2 if config.normalization == "LayerNorm" else 1)


def _attention(config: TransformerConfig, tp: int) -> int:
    """Projection to queries, keys and values; projection back; norms of query and key heads (all ranks)."""
    heads, groups, width = config.num_attention_heads // tp, config.num_query_groups // tp, config.kv_channels
    mixed = (heads + 2 * groups) * width
    weights = config.hidden_size * (mixed + heads * width)
    biases = mixed if config.add_bias_linear or config.add_qkv_bias else 0
    biases += config.hidden_size if config.add_bias_linear else 0
    return weights + biases + (2 * _norm(config, width) if config.qk_layernorm else 0)


def _mlp(config: TransformerConfig, tp: int) -> int:
    """Projection to the inner width (twice with a gate) and back, whose bias all ranks have."""
    inner = config.ffn_hidden_size // tp
    first = inner * (2 if config.gated_linear_unit else 1)
    biases = first + config.hidden_size if config.add_bias_linear else 0
    return config.hidden_size * (first + inner) + biases
