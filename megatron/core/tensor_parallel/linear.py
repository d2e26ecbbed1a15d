"""The linear function of all layers: one autograd node that knows main gradients and slow half precision,
and sends what a split layer must send while it computes.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from megatron.core import collectives, parallel_state
from megatron.core.collectives import PendingResult, group_size, tensor_group
from megatron.core.fusions.matmul import (
    accumulate_weight_gradient,
    as_rows,
    input_gradient,
    linear_forward,
    weight_gradient,
)
from megatron.core.tensor_parallel import deferred_gradients
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.overlap import OverlappedMatmuls

# The scratch buffer of gathered inputs is not the one of the mappings, whose results may still be in use.
_GATHERED_INPUT = "linear_input"


def _has_main_grad(weight: Tensor) -> bool:
    return getattr(weight, "main_grad", None) is not None


def _add_to_main_grad(weight: Any, grad_output: Tensor, x: Tensor) -> None:
    """Adds a gradient where the data-parallel wrapper would; its hook then leaves it alone."""
    accumulate_weight_gradient(weight.main_grad, grad_output, x)
    weight.grad_added_to_main_grad = True


def _weight_gradient(weight: Tensor, grad_output: Tensor, x: Tensor, into_main_grad: bool) -> Tensor:
    """The gradient to hand to autograd: the real one, or a stand-in once ``main_grad`` holds it.

    It is that of this rank's part of the weight, and whole: nothing is summed over tensor-parallel ranks.
    """
    grad_output, x = as_rows(grad_output), as_rows(x)
    if not into_main_grad:
        return weight_gradient(grad_output, x)
    _add_to_main_grad(weight, grad_output, x)
    # The parameter's hooks (gradient reduction) fire only if some gradient arrives. A weight used twice adds
    # this one to the other use's, which then goes to main_grad: it must be zero. Otherwise nobody reads it.
    make = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return make(weight.shape, dtype=weight.dtype, device=weight.device)


def may_be_late(weight: Tensor) -> bool:
    """Whether the weight's gradient may come after this backward pass, and the schedule wants it to."""
    # A weight with two uses is ready once autograd has both gradients: none of them may come later.
    return deferred_gradients.is_deferring() and not getattr(weight, "zero_out_wgrad", False)


def maybe_defer_weight_gradient(
    weight: Tensor,
    grad_output: Tensor,
    x: Tensor,
    into_main_grad: bool,
    late: bool,
    whole_of: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor | None:
    """The gradient to hand to autograd, or None if it is left to the schedule.

    Args:
        weight: [out, in].
        grad_output: [..., out].
        x: [..., in], or what ``whole_of`` makes that from when a late gradient is computed at last.
        into_main_grad: add it to ``weight.main_grad``, if there is one.
        late: leave it to the schedule, which runs it when there is nothing better to do.
        whole_of: gathers ``x``.
    """
    if late:
        _defer_weight_gradient(weight, grad_output, lambda: whole_of(x))
        return None
    return _weight_gradient(weight, grad_output, x, into_main_grad and _has_main_grad(weight))


def _defer_weight_gradient(weight: Tensor, grad_output: Tensor, get_x: Callable[[], Tensor]) -> None:
    def compute() -> None:
        whole = get_x()
        if _has_main_grad(weight):
            _add_to_main_grad(weight, as_rows(grad_output), as_rows(whole))
        else:
            grad = weight_gradient(as_rows(grad_output), as_rows(whole))
            weight.grad = grad if weight.grad is None else weight.grad + grad
        ready = getattr(weight, "gradient_ready", None)
        if ready is not None:
            ready()

    deferred_gradients.defer(compute)


def _start_gather(
    x: Tensor, group: ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, Work | None]:
    """[s/TP, b, h] -> [s, b, h] in scratch memory, and what to wait for before it may be read."""
    shape = [x.shape[0] * group_size(group), *x.shape[1:]]
    whole = parallel_state.get_global_memory_buffer().get_tensor(shape, x.dtype, _GATHERED_INPUT)
    return whole, collectives.all_gather(whole, x, group, async_op)


def _send_input_gradient(grad_input: Tensor, ctx: Any) -> PendingResult:
    """Starts to sum an input gradient over the ranks.

    Sequence parallelism leaves every rank its part of the sequence; otherwise all get the whole sum.
    """
    source = grad_input.contiguous()
    if ctx.sequence_parallel:
        part = source.new_empty(source.shape[0] // group_size(ctx.group), *source.shape[1:])
        sending = PendingResult(part)
        sending.add(collectives.reduce_scatter(part, source, ctx.group, async_op=True), source)
        return sending
    sending = PendingResult(source)
    if ctx.allreduce_dgrad:
        sending.add(collectives.all_reduce(source, ctx.group, async_op=True))
    return sending


class LinearWithGradAccumulationAndAsyncCommunication(torch.autograd.Function):
    """``x weight^T + bias``; the weight's gradient may go straight into ``weight.main_grad``.

    Under sequence parallelism the input is this rank's part of the sequence: it is gathered for the matmul,
    not kept, and gathered again in backward while the input gradient is computed. The input gradient is
    reduced over the ranks while the weight gradient is computed.
    """

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
        group: ProcessGroup | None = None,
        overlap: OverlappedMatmuls | None = None,
    ) -> Tensor:
        ctx.save_for_backward(input if ctx.needs_input_grad[1] else None, weight)
        ctx.group, ctx.overlap = tensor_group(group), overlap
        many = group_size(ctx.group) > 1
        ctx.sequence_parallel, ctx.allreduce_dgrad = many and sequence_parallel, many and allreduce_dgrad
        ctx.has_bias = bias is not None
        ctx.into_main_grad = gradient_accumulation_fusion
        ctx.grad_output_buffer, ctx.deferral_limit = grad_output_buffer, wgrad_deferral_limit
        if ctx.sequence_parallel and overlap is not None:
            return overlap.gather_then_multiply(input, weight.t(), bias, ctx.group, keep=False)[0]
        whole = _start_gather(input, ctx.group)[0] if ctx.sequence_parallel else input
        return linear_forward(whole, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        input, weight = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[1] and not _left_to_the_flush(ctx, grad_output)
        late = needs_weight and may_be_late(weight)
        whole, gathering = input, None
        if ctx.sequence_parallel and needs_weight and not late:
            whole, gathering = _start_gather(input, ctx.group, async_op=True)
        sending = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            sending = _start_input_gradient(ctx, grad_output, weight, gathering)
        elif gathering is not None:
            gathering.wait()
        if needs_weight:
            grad_weight = maybe_defer_weight_gradient(
                weight, grad_output, whole, ctx.into_main_grad, late, _gatherer(ctx)
            )
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = as_rows(grad_output).sum(dim=0)
        grad_input = None if sending is None else sending.wait()
        return grad_input, grad_weight, grad_bias, None, None, None, None, None, None, None


def _start_input_gradient(
    ctx: Any, grad_output: Tensor, weight: Tensor, gathering: Work | None
) -> PendingResult:
    """The input's gradient, whose sum over the ranks may go on while the weight's is computed."""
    if ctx.overlap is not None and (ctx.sequence_parallel or ctx.allreduce_dgrad):
        sending = ctx.overlap.multiply_then_reduce(
            grad_output, weight, ctx.group, scatter=ctx.sequence_parallel
        )
        if gathering is not None:
            gathering.wait()
        return sending
    grad_input = input_gradient(grad_output, weight)
    if gathering is not None:
        gathering.wait()
    return _send_input_gradient(grad_input, ctx)


def _gatherer(ctx: Any) -> Callable[[Tensor], Tensor]:
    """What makes the whole input from this rank's part when a late weight gradient is computed."""
    sequence_parallel, group = ctx.sequence_parallel, ctx.group
    return lambda x: _start_gather(x, group)[0] if sequence_parallel else x


def _left_to_the_flush(ctx: Any, grad_output: Tensor) -> bool:
    """True once the output's gradient is in the caller's buffer, to compute the weight's from later."""
    buffer, limit = ctx.grad_output_buffer, ctx.deferral_limit
    if buffer is None or (limit and len(buffer) >= limit):
        return False
    buffer.append(grad_output)
    return True


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
    *,
    group: ProcessGroup | None = None,
    overlap: OverlappedMatmuls | None = None,
) -> Tensor:
    """``input weight^T + bias``.  input: [..., in], weight: [out, in], bias: [out] -> [..., out].

    Args:
        input, weight, bias: operands of one dtype.
        gradient_accumulation_fusion: add the weight's gradient to ``weight.main_grad`` in backward (where
            the weight has one) and set ``weight.grad_added_to_main_grad``; the same numbers as adding
            ``weight.grad`` later.
        allreduce_dgrad: sum the input's gradient over the ranks while the weight's is computed.
        sequence_parallel: ``input`` is this rank's part of the first dimension; the output has the whole, and
            the input's gradient is reduced to this rank's part.
        grad_output_buffer: list that takes the output's gradient instead of a weight gradient being computed.
        wgrad_deferral_limit: how many it takes; 0 means any number.
        async_grad_allreduce: old name of ``allreduce_dgrad``.
        group: ranks among which the layer is split; the tensor-parallel ones by default.
        overlap: how matmuls overlap with the traffic before and after them; by default a matmul is whole,
            and only what the weight's gradient does not wait for travels behind it.
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
        group,
        overlap,
    )


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
        overlap: OverlappedMatmuls,
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
            grad_weight = maybe_defer_weight_gradient(weight, whole, input, ctx.into_main_grad, late)
        return grad_input, grad_weight, None, None, None, None


class LinearWithFrozenWeight(torch.autograd.Function):
    """``x weight^T + bias`` that keeps the weight but not the input: there is no weight gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.has_bias, ctx.allreduce_dgrad, ctx.group = bias is not None, allreduce_dgrad, tensor_group(group)
        return linear_forward(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = input_gradient(grad_output, weight).contiguous()
            if ctx.allreduce_dgrad:
                collectives.all_reduce(grad_input, ctx.group)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = as_rows(grad_output).sum(dim=0)
        return grad_input, None, grad_bias, None, None


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
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The same without a gradient for the weight; what concerns that gradient has no effect."""
    if async_grad_allreduce is not None:
        warnings.warn("async_grad_allreduce is the old name of allreduce_dgrad", DeprecationWarning)
        allreduce_dgrad = async_grad_allreduce
    if sequence_parallel:
        # Its backward reduces the input's gradient as well.
        input, allreduce_dgrad = gather_from_sequence_parallel_region(input, group=group), False
    return LinearWithFrozenWeight.apply(input, weight, bias, allreduce_dgrad, group)
