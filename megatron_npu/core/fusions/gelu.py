"""GELU by the error function or by its tanh approximation, as asked."""

import torch
from torch import Tensor

from megatron_npu.registry import replaces


@replaces(
    "megatron.core.fusions.gelu.gelu",
    operators=("npu_gelu",),
    since="6.0.0",
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
)
def gelu(x: Tensor, approximate: str) -> Tensor:
    """``F.gelu`` computes the tanh form on most NPUs whatever it is asked for; this operator listens."""
    return torch.ops.npu.npu_gelu(x, approximate=approximate)
