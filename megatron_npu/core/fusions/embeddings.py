"""Rotary position embedding."""

from typing import Any

import torch
from torch import Tensor

from megatron_npu import chip
from megatron_npu.registry import replaces

_WIDEST = 894


def _unsuitable(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    _, b, n, d = t.shape
    if chip.is_first_generation():
        fits = not interleaved and d == 128 and max(b, n) <= 1000
        return None if fits else "anything but halves of heads of 128 channels on a first-generation chip"
    if d % 2 or d > _WIDEST:
        return f"an odd width or one beyond {_WIDEST}"
    crowded = b * n >= 1000 if interleaved else max(b, n) >= 1000
    return "1000 or more heads" if crowded else None


@replaces(
    "megatron.core.fusions.embeddings.rotary",
    operators=("npu_rotary_mul",),
    since="5.0.rc3",
    unless=_unsuitable,
    limits=f"odd widths or beyond {_WIDEST}, 1000 or more heads; on 910A all but halves of 128 channels",
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
)
def rotary(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Keeps the tables only, where the operator's own derivative would keep ``t`` as well."""
    return _Rotate.apply(t, cos, sin, "interleave" if interleaved else "half")


class _Rotate(torch.autograd.Function):
    """The gradient is rotated back, by the same kernel: both channels of a pair share their angle."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor, mode: str) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.mode = mode
        return torch.ops.npu.npu_rotary_mul(t, cos, sin, mode)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return torch.ops.npu.npu_rotary_mul(grad.contiguous(), cos, -sin, ctx.mode), None, None, None
