"""GELU-gated linear units."""

import torch
from torch import Tensor

from megatron_npu import chip
from megatron_npu.registry import replaces


@replaces(
    "megatron.core.fusions.fused_bias_geglu.gated_gelu",
    operators=("npu_geglu",),
    since="5.0.rc3",
    chips=chip.FROM_910B,
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
)
def gated_gelu(y: Tensor, approximate: str, gate_last: bool) -> Tensor:
    """The operator activates the second half unless told otherwise; its approximation 1 is tanh, 0 erf."""
    return torch.ops.npu.npu_geglu(y.contiguous(), -1, int(approximate == "tanh"), not gate_last)[0]
