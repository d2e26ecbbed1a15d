"""Root-mean-square normalisation."""

import torch
from torch import Tensor

from megatron_npu.registry import replaces


@replaces(
    "megatron.core.fusions.fused_layer_norm.rms_norm",
    operators=("npu_rms_norm",),
    since="5.0.0",
    unless=lambda x, weight, eps: None if 2 <= x.dim() <= 8 else "fewer than 2 or more than 8 dimensions",
    limits="fewer than 2 or more than 8 dimensions",
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """One rounding, after the product with the weight. The residual stream may be wider than the weight."""
    if x.dtype == weight.dtype:
        return torch.ops.npu.npu_rms_norm(x, weight, eps)[0]
    return torch.ops.npu.npu_rms_norm(x, weight.to(x.dtype), eps)[0].to(weight.dtype)
