"""Softmax of attention scores: scale, hide, normalise."""

import torch
from torch import Tensor

from megatron.core.overrides import overridable

# What hidden scores are set to before the softmax. Finite, so that a row in which everything is hidden stays
# a number.
HIDDEN_SCORE = -10000.0


@overridable
def scaled_masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, in_fp32: bool) -> Tensor:
    """``softmax(hide(scale * scores, mask))`` over the last dimension.

    Args:
        scores: [b, n, sq, sk].
        mask: bool, broadcastable to the scores, True where a key is hidden; None hides nothing.
        scale: factor in front of the scores.
        in_fp32: widen half-precision scores first.

    Returns:
        Probabilities in the dtype of ``scores``.
    """
    wide = scores.float() if in_fp32 else scores
    if scale != 1.0:
        wide = wide * scale
    if mask is not None:
        wide = wide.masked_fill(mask, HIDDEN_SCORE)
    return torch.softmax(wide, dim=-1).to(scores.dtype)
