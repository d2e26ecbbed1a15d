"""Softmax of attention scores."""

import torch
from torch import Tensor

from megatron_npu.registry import replaces


def _unsuitable(scores: Tensor, mask: Tensor | None, scale: float, in_fp32: bool) -> str | None:
    if mask is None:
        return "no mask"
    sides = scores.shape[-2:]
    if scores.dim() != 4 or any(side % 32 or not 32 <= side <= 4096 for side in sides):
        return "sides that are not multiples of 32 in 32..4096"
    return None


@replaces(
    "megatron.core.fusions.fused_softmax.scaled_masked_softmax",
    operators=("npu_scaled_masked_softmax",),
    since="5.0.rc3",
    unless=_unsuitable,
    limits="no mask, sides that are not multiples of 32 in 32..4096",
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2},
    note="a query that sees nothing passes on a gradient; the default's is 0",
)
def scaled_masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, in_fp32: bool) -> Tensor:
    """The operator masks with -10000 as the default does. It says nothing about the type it computes in, so
    scores are widened where the caller asks for it.
    """
    wide = scores.float() if in_fp32 else scores
    return torch.ops.npu.npu_scaled_masked_softmax(wide, mask, scale, False).to(scores.dtype)
