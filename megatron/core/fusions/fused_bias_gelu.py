"""Bias and tanh GELU in one operation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.overrides import overridable


def bias_gelu(bias: Tensor, y: Tensor) -> Tensor:
    """Tanh GELU of ``y + bias`` (Hendrycks and Gimpel, 2016).  y: [..., f], bias: [f]."""
    return F.gelu(y + bias, approximate="tanh")


def bias_gelu_back(g: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Gradient of :func:`bias_gelu` with respect to ``y``, for the output gradient ``g``."""
    return torch.ops.aten.gelu_backward(g, y + bias, approximate="tanh")


class GeLUFunction(torch.autograd.Function):
    """Autograd form: keeps ``input`` and ``bias``, adds them again in backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(input, bias)
        return bias_gelu(bias, input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        input, bias = ctx.saved_tensors
        grad = bias_gelu_back(grad_output, bias, input)
        # [..., f] -> [f]
        return grad, grad.view(-1, grad.shape[-1]).sum(0)


@overridable
def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """Tanh GELU of ``input + bias``, differentiable.  input: [..., f], bias: [f] -> [..., f]."""
    return GeLUFunction.apply(input, bias)
