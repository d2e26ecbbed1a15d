"""SiLU-gated linear units (Shazeer, 2020): silu of the first half times the second."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.overrides import overridable


@overridable
def swiglu(y: Tensor) -> Tensor:
    """``silu(gate) * up``, differentiable.  y: [..., 2f], gate in the first half -> [..., f]."""
    return SwiGLUFunction.apply(y, False)


def swiglu_back(g: Tensor, y: Tensor) -> Tensor:
    """Gradient of :func:`swiglu` with respect to ``y``.  g: [..., f] -> [..., 2f]"""
    gate, up = y.chunk(2, dim=-1)
    grad = torch.empty_like(y)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.mul(g, F.silu(gate), out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(g * up, gate))
    return grad


class SwiGLUFunction(torch.autograd.Function):
    """Autograd form: keeps its input only, and computes the activation again in backward."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, fp8_input_store: bool) -> Tensor:
        _refuse_fp8(fp8_input_store)
        ctx.save_for_backward(input)
        gate, up = input.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        return swiglu_back(grad_output, input), None


def _refuse_fp8(fp8_input_store: bool) -> None:
    if fp8_input_store:
        raise ConfigError("activation_func_fp8_input_store: no fp8 storage here; leave it off")


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


class BiasSwiGLUFunction(torch.autograd.Function):
    """:class:`SwiGLUFunction` of ``input + bias``."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor, fp8_input_store: bool) -> Tensor:
        _refuse_fp8(fp8_input_store)
        ctx.save_for_backward(input, bias)
        gate, up = (input + bias).chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        input, bias = ctx.saved_tensors
        grad = swiglu_back(grad_output, input + bias)
        return grad, grad.sum_to_size(bias.shape), None


class WeightedSwiGLUFunction(torch.autograd.Function):
    """Autograd form of :func:`weighted_swiglu`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weights: Tensor, fp8_input_store: bool) -> Tensor:
        _refuse_fp8(fp8_input_store)
        ctx.save_for_backward(input, weights)
        gate, up = input.chunk(2, dim=-1)
        return (F.silu(gate).mul_(up) * weights).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        input, weights = ctx.saved_tensors
        return *weighted_swiglu_back(grad_output, input, weights), None


def bias_swiglu(y: Tensor, bias: Tensor) -> Tensor:
    """:func:`swiglu` of ``y + bias``."""
    return swiglu(y + bias)


def bias_swiglu_back(g: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Gradient of :func:`bias_swiglu` with respect to ``y``."""
    return swiglu_back(g, y + bias)


def weighted_swiglu(y: Tensor, weights: Tensor) -> Tensor:
    """:func:`swiglu` times one weight per row, in the dtype of ``y``.  weights: [rows, 1]"""
    return (swiglu(y) * weights).to(y.dtype)


def weighted_swiglu_back(g: Tensor, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`weighted_swiglu` with respect to ``y`` and ``weights``, each in its dtype."""
    gate, up = y.chunk(2, dim=-1)
    grad_y = swiglu_back((g * weights).to(y.dtype), y)
    grad_weights = (g.to(weights.dtype) * (F.silu(gate) * up)).sum(dim=-1, keepdim=True)
    return grad_y, grad_weights.to(weights.dtype)


def bias_swiglu_impl(input: Tensor, bias: Tensor | None, fp8_input_store: bool = False) -> Tensor:
    """Differentiable :func:`swiglu` with an optional bias.  [..., 2f] -> [..., f]

    Raises:
        ConfigError: ``fp8_input_store``; activations are kept in their own dtype here.
    """
    _refuse_fp8(fp8_input_store)
    return swiglu(input if bias is None else input + bias)


def weighted_bias_swiglu_impl(
    input: Tensor, bias: Tensor | None, weights: Tensor, fp8_input_store: bool = False
) -> Tensor:
    """Differentiable :func:`weighted_swiglu`; a bias is refused."""
    _refuse_fp8(fp8_input_store)
    if bias is not None:
        raise ConfigError("weighted_bias_swiglu_impl takes no bias; pass None")
    return weighted_swiglu(input, weights)
