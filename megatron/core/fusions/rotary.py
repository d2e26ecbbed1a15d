"""Rotary position embedding (Su et al., 2021): rotates channel pairs by angles that grow with position."""

from typing import Any

import torch
from torch import Tensor

from megatron.core.overrides import overridable


@overridable
def rotary(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates all channels of ``t``.

    Args:
        t: [s, b, n, d].
        cos, sin: [s, 1, 1, d] of the dtype of ``t``; each angle occurs twice, at both channels of its pair.
        interleaved: pairs are neighbours (2k, 2k + 1); otherwise (k, k + d/2).
    """
    return _Rotate.apply(t, cos, sin, interleaved)


def _pairs(t: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """First and second channel of every pair.  [..., d] -> 2 x [..., d/2]"""
    if interleaved:
        return t[..., 0::2], t[..., 1::2]
    first, second = t.chunk(2, dim=-1)
    return first, second


def _rotate(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, direction: float) -> Tensor:
    first, second = _pairs(t, interleaved)
    cos, sin = _pairs(cos, interleaved)[0], _pairs(sin, interleaved)[0]
    out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    out_first, out_second = _pairs(out, interleaved)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=direction)
    return out


class _Rotate(torch.autograd.Function):
    """Keeps the angles only: the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotate(t, cos, sin, interleaved, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, ctx.interleaved, -1.0), None, None, None
