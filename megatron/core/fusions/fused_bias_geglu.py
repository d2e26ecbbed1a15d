"""GELU-gated linear units (Shazeer, 2020): one half of the input, activated, times the other half."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.overrides import overridable


@overridable
def gated_gelu(y: Tensor, approximate: str, gate_last: bool) -> Tensor:
    """``gelu(gate) * up``, differentiable.  y: [..., 2f] -> [..., f].

    Args:
        y: the gate's half and the other half, in this order unless ``gate_last``.
        approximate: ``"none"`` for the error function, ``"tanh"`` for the approximation.
        gate_last: the second half is the gate.
    """
    return _GatedGelu.apply(y, approximate, gate_last)


def _halves(y: Tensor, gate_last: bool) -> tuple[Tensor, Tensor]:
    """(gate, up).  [..., 2f] -> 2 x [..., f]"""
    first, second = y.chunk(2, dim=-1)
    return (second, first) if gate_last else (first, second)


class _GatedGelu(torch.autograd.Function):
    """Keeps its input only, and computes the activation again in backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, approximate: str, gate_last: bool) -> Tensor:
        ctx.save_for_backward(y)
        ctx.approximate, ctx.gate_last = approximate, gate_last
        gate, up = _halves(y, gate_last)
        return F.gelu(gate, approximate=approximate).mul_(up)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (y,) = ctx.saved_tensors
        gate, up = _halves(y, ctx.gate_last)
        grad = torch.empty_like(y)
        grad_gate, grad_up = _halves(grad, ctx.gate_last)
        torch.mul(g, F.gelu(gate, approximate=ctx.approximate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.gelu_backward(g * up, gate, approximate=ctx.approximate))
        return grad, None, None


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def geglu(y: Tensor) -> Tensor:
    """Tanh GELU of the first half times the second.  [..., 2f] -> [..., f]"""
    return gated_gelu(y, "tanh", False)


def bias_geglu(bias: Tensor, y: Tensor) -> Tensor:
    """:func:`geglu` of ``y + bias``."""
    return geglu(y + bias)


def geglu_back(g: Tensor, y: Tensor) -> Tensor:
    """Gradient of :func:`geglu` with respect to ``y``.  g: [..., f] -> [..., 2f]"""
    gate, up = y.chunk(2, dim=-1)
    grad_gate = torch.ops.aten.gelu_backward(g * up, gate, approximate="tanh")
    return torch.cat((grad_gate, g * F.gelu(gate, approximate="tanh")), dim=-1)


def bias_geglu_back(g: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Gradient of :func:`bias_geglu` with respect to ``y``."""
    return geglu_back(g, y + bias)


class GeGLUFunction(torch.autograd.Function):
    """Autograd form of :func:`geglu`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        ctx.save_for_backward(input)
        gate, up = input.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return geglu_back(grad_output, *ctx.saved_tensors)


class BiasGeGLUFunction(torch.autograd.Function):
    """:class:`GeGLUFunction` of ``input + bias``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(input, bias)
        gate, up = (input + bias).chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        input, bias = ctx.saved_tensors
        grad = bias_geglu_back(grad_output, input, bias)
        return grad, grad.sum_to_size(bias.shape)


def bias_geglu_impl(input: Tensor, bias: Tensor | None) -> Tensor:
    """Differentiable :func:`geglu` with an optional bias.  [..., 2f] -> [..., f]"""
    return geglu(input if bias is None else input + bias)
