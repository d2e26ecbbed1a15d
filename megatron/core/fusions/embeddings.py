"""Lookup in an embedding table, and rotary position embedding."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.overrides import overridable


@overridable
def embedding_lookup(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table`` at ``ids``.  ids: [b, s], table: [V, h] -> [b, s, h].

    Gradients of ids that occur often are summed in fp32 and rounded once.
    """
    return _Lookup.apply(ids, table)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        wide = grad.float() if ctx.dtype in (torch.float16, torch.bfloat16) else grad
        return None, torch.ops.aten.embedding_dense_backward(wide, ids, ctx.rows, -1, False).to(ctx.dtype)


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
