"""The linear function of row-parallel layers whose sum over the ranks overlaps with the product."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.fusions.matmul import input_gradient
from megatron.core.tensor_parallel.linear import may_be_late, weight_gradient_or_later
from megatron.core.tensor_parallel.overlap import OverlappedProducts


class LinearThenSum(torch.autograd.Function):
    """``x weight^T``, summed over the ranks; under sequence parallelism each keeps its part of the sum.

    There, backward gathers the output's gradient while it computes the input's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        gradient_accumulation_fusion: bool,
        sequence_parallel: bool,
        group: ProcessGroup,
        overlap: OverlappedProducts,
    ) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        ctx.into_main_grad, ctx.sequence_parallel = gradient_accumulation_fusion, sequence_parallel
        ctx.group, ctx.overlap = group, overlap
        return overlap.multiply_then_reduce(input, weight.t(), group, scatter=sequence_parallel).wait()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1]
        whole = grad_output
        if ctx.sequence_parallel:
            # [s/TP, b, out] -> [s, b, in/TP], and [s, b, out]
            grad_input, whole = ctx.overlap.gather_then_multiply(
                grad_output, weight, None, ctx.group, keep=needs_weight
            )
        else:
            grad_input = input_gradient(grad_output, weight)
        grad_weight = None
        if needs_weight:
            late = may_be_late(weight)
            grad_weight = weight_gradient_or_later(weight, whole, input, ctx.into_main_grad, late)
        return grad_input, grad_weight, None, None, None, None
