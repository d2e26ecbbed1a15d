"""The linear function of all layers: one autograd node that knows main gradients and slow half precision."""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import accelerator
from megatron.core.errors import NotBuiltYetError
from megatron.core.fusions.weight_gradient import accumulate_weight_gradient, weight_gradient


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias`` in the dtype of ``x``, computed in what this device multiplies fast."""
    compute = accelerator.matmul_compute_dtype(x.dtype, x.device)
    if compute == x.dtype:
        return F.linear(x, weight, bias)
    wide_bias = None if bias is None else bias.to(compute)
    return F.linear(x.to(compute), weight.to(compute), wide_bias).to(x.dtype)


def _input_gradient(grad_output: Tensor, weight: Tensor) -> Tensor:
    """``grad_output weight``.  [..., out], [out, in] -> [..., in]"""
    compute = accelerator.matmul_compute_dtype(grad_output.dtype, grad_output.device)
    return grad_output.to(compute).matmul(weight.to(compute)).to(grad_output.dtype)


def _rows(t: Tensor) -> Tensor:
    """[s, b, h] -> [s*b, h]"""
    return t.reshape(-1, t.shape[-1])


def _weight_gradient(weight: Tensor, grad_output: Tensor, x: Tensor, into_main_grad: bool) -> Tensor:
    """The gradient to hand to autograd: the real one, or a stand-in once ``main_grad`` holds it."""
    grad_output, x = _rows(grad_output), _rows(x)
    if not into_main_grad:
        return weight_gradient(grad_output, x)
    accumulate_weight_gradient(weight.main_grad, grad_output, x)
    weight.grad_added_to_main_grad = True
    # The parameter's hooks (gradient reduction) fire only if some gradient arrives. A weight used twice adds
    # this one to the other use's, which then goes to main_grad: it must be zero. Otherwise nobody reads it.
    make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return make(weight.shape, dtype=weight.dtype, device=weight.device)


class LinearWithGradAccumulationAndAsyncCommunication(torch.autograd.Function):
    """``x weight^T + bias``; the weight's gradient may go straight into ``weight.main_grad``."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: list[Tensor] | None,
        wgrad_deferral_limit: int | None,
    ) -> Tensor:
        if allreduce_dgrad or sequence_parallel:
            raise NotBuiltYetError("a linear layer split over tensor-parallel ranks")
        if grad_output_buffer is not None:
            raise NotBuiltYetError("deferring the output layer's weight gradient")
        ctx.save_for_backward(input, weight)
        ctx.has_bias = bias is not None
        ctx.into_main_grad = gradient_accumulation_fusion
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        grad_input = _input_gradient(grad_output, weight) if ctx.needs_input_grad[0] else None
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1]:
            into_main_grad = ctx.into_main_grad and getattr(weight, "main_grad", None) is not None
            grad_weight = _weight_gradient(weight, grad_output, input, into_main_grad)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = _rows(grad_output).sum(dim=0)
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


def linear_with_grad_accumulation_and_async_allreduce(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: int | None = 0,
    async_grad_allreduce: bool | None = None,
) -> Tensor:
    """``input weight^T + bias``.  input: [..., in], weight: [out, in], bias: [out] -> [..., out].

    Args:
        input, weight, bias: operands of one dtype.
        gradient_accumulation_fusion: add the weight's gradient to ``weight.main_grad`` in backward (where
            the weight has one) and set ``weight.grad_added_to_main_grad``; the same numbers as adding
            ``weight.grad`` later.
        allreduce_dgrad, sequence_parallel: communication of split layers, not built yet.
        grad_output_buffer, wgrad_deferral_limit: deferred weight gradients, not built yet.
        async_grad_allreduce: old name of ``allreduce_dgrad``.
    """
    if async_grad_allreduce is not None:
        warnings.warn("async_grad_allreduce is the old name of allreduce_dgrad", DeprecationWarning)
        allreduce_dgrad = async_grad_allreduce
    return LinearWithGradAccumulationAndAsyncCommunication.apply(
        input,
        weight,
        bias,
        gradient_accumulation_fusion,
        allreduce_dgrad,
        sequence_parallel,
        grad_output_buffer,
        wgrad_deferral_limit,
    )


def linear_with_frozen_weight(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: None = None,
    async_grad_allreduce: bool | None = None,
) -> Tensor:
    """The same without a gradient for the weight."""
    return linear_with_grad_accumulation_and_async_allreduce(
        input,
        weight.detach(),
        bias,
        False,
        allreduce_dgrad,
        sequence_parallel,
        async_grad_allreduce=async_grad_allreduce,
    )
