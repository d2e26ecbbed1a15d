"""SiLU-gated linear units."""

import torch
from torch import Tensor

from megatron_npu import chip
from megatron_npu.registry import replaces


@replaces(
    "megatron.core.fusions.fused_bias_swiglu.swiglu",
    operators=("npu_swiglu",),
    since="6.0.rc1",
    chips=chip.FROM_910B,
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
)
def swiglu(y: Tensor) -> Tensor:
    """The operator activates the first half, in fp32, and wants its input in one piece."""
    return torch.ops.npu.npu_swiglu(y.contiguous(), -1)
