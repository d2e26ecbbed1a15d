"""GELU by the error function or by its tanh approximation, as asked; alone and after a bias."""

import torch
from torch import Tensor

from megatron_npu.registry import replaces


@replaces(
    "megatron.core.fusions.fused_bias_gelu.gelu",
    operators=("npu_gelu",),
    since="6.0.0",
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
)
def gelu(x: Tensor, approximate: str) -> Tensor:
    """``F.gelu`` computes the tanh form on most NPUs whatever it is asked for; this operator listens."""
    return torch.ops.npu.npu_gelu(x, approximate=approximate)


@replaces(
    "megatron.core.fusions.fused_bias_gelu.bias_gelu_impl",
    operators=("npu_gelu",),
    since="6.0.0",
    bound={torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2},
)
def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """The form is named: ``F.gelu`` computes the tanh form on most NPUs whatever it is asked for."""
    return torch.ops.npu.npu_gelu(input + bias, approximate="tanh")
