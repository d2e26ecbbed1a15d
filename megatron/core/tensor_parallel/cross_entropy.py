"""Cross entropy of logits that are split over tensor-parallel ranks along the vocabulary."""

from torch import Tensor

from megatron.core.collectives import tensor_group
from megatron.core.fusions.fused_cross_entropy import (  # noqa: F401  (also importable from here)
    VocabParallelCrossEntropy,
    split_cross_entropy,
)


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Per-token loss, fp32, the same on all ranks.  logits: [s, b, v/TP], target: [s, b] -> [s, b].

    Label smoothing counts the whole vocabulary, so the loss does not depend on the number of ranks.
    """
    return split_cross_entropy(vocab_parallel_logits, target, label_smoothing, tensor_group())
