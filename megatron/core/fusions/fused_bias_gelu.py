"""GELU without a gate (Hendrycks and Gimpel, 2016), alone and with the bias before it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.accelerator import row_blocks
from megatron.core.overrides import overridable

# Tanh GELU is x/2 (1 + tanh(z)) = x sigmoid(2 z) with z = sqrt(2/pi) (x + 0.044715 x^3). A vectorised sigmoid
# takes a sixth of the time of a vectorised tanh.
_LINEAR = 2.0 * math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715 * _LINEAR


@overridable
def gelu(x: Tensor, approximate: str) -> Tensor:
    """``x Phi(x)``, differentiable.  [..., f] -> [..., f]

    Replaceable because not every back end of torch computes the form that it is asked for.

    Args:
        x: input.
        approximate: ``"none"`` for the error function, ``"tanh"`` for the approximation.
    """
    return F.gelu(x, approximate=approximate)


@overridable
def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """Tanh GELU of ``input + bias``, differentiable.  input: [..., f], bias: [f] -> [..., f]."""
    return GeLUFunction.apply(input, bias)


class GeLUFunction(torch.autograd.Function):
    """Keeps ``input`` and ``bias``; computes in fp32, some rows at a time, and rounds once."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(input, bias)
        rows, out = _rows(input), torch.empty_like(input)
        out_rows, wide_bias = out.view(rows.shape), _widen(bias)
        for block in row_blocks(rows.shape[0], rows.shape[1], input.device):
            x = rows[block] + wide_bias
            gate = (x * x).mul_(_CUBIC).add_(_LINEAR).mul_(x).sigmoid_()
            torch.mul(x, gate, out=out_rows[block])
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        input, bias = ctx.saved_tensors
        rows, grad_rows, wide_bias = _rows(input), _rows(grad_output), _widen(bias)
        grad = torch.empty_like(rows)
        grad_bias = torch.zeros_like(wide_bias)
        for block in row_blocks(rows.shape[0], rows.shape[1], input.device):
            x = rows[block] + wide_bias
            square = x * x
            gate = torch.mul(square, _CUBIC).add_(_LINEAR).mul_(x).sigmoid_()
            # d/dx x s(u(x)) = s + x s (1 - s) u'(x), u' = linear + 3 cubic x^2
            slope = square.mul_(3.0 * _CUBIC).add_(_LINEAR).mul_(x)
            slope.mul_(1.0 - gate).add_(1.0).mul_(gate).mul_(grad_rows[block])
            grad_bias += slope.sum(dim=0)
            grad[block] = slope
        return grad.view(input.shape), grad_bias.to(bias.dtype)


def _rows(t: Tensor) -> Tensor:
    """[..., f] -> [rows, f]"""
    return t.reshape(-1, t.shape[-1])


def _widen(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def bias_gelu(bias: Tensor, y: Tensor) -> Tensor:
    """Tanh GELU of ``y + bias`` (Hendrycks and Gimpel, 2016).  y: [..., f], bias: [f]."""
    return F.gelu(y + bias, approximate="tanh")


def bias_gelu_back(g: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Gradient of :func:`bias_gelu` with respect to ``y``, for the output gradient ``g``."""
    return torch.ops.aten.gelu_backward(g, y + bias, approximate="tanh")
