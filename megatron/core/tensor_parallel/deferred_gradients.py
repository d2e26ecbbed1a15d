"""Weight gradients computed later than the input gradients of the same layer.

A pipeline stage that is waited for wants its input gradient out as soon as possible; its weight gradients are
work for the gaps of the schedule (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2). While
:func:`deferring` is active a linear layer hands the computation of its weight gradient to :func:`defer` and
returns no gradient for the weight; the schedule calls :func:`run` when it has time.

The closures hold what they need (the layer's input and the gradient of its output), so an activation lives
until its weight gradient has run. The queue is first in, first out, and belongs to the process: autograd may
run backward on a thread of its own.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.core.errors import TrainingError, UsageError
from megatron.core.fusions.matmul import accumulate_weight_gradient, weight_gradient
from megatron.core.tensor_parallel.mappings import _gather_along_first_dim
from megatron.core.utils import prepare_input_tensors_for_wgrad_compute
from megatron.core.utils.tensors import mark

Compute = Callable[[], None]

_QUEUE: deque[Compute] = deque()
_DEPTH = [0]


def is_deferring() -> bool:
    """True while some :func:`deferring` context is active."""
    return _DEPTH[0] > 0


@contextlib.contextmanager
def deferring() -> Iterator[None]:
    """Context of a backward pass whose weight gradients are put off."""
    _DEPTH[0] += 1
    try:
        yield
    finally:
        _DEPTH[0] -= 1


def defer(compute: Compute) -> None:
    """Puts ``compute`` at the end of the queue.

    It adds the gradient to ``weight.main_grad`` (``weight.grad`` without a gradient buffer) and then calls
    ``weight.gradient_ready()`` where the weight has such an attribute.
    """
    _QUEUE.append(compute)


def pending() -> int:
    """Number of computations that have been put off and not yet run."""
    return len(_QUEUE)


def run(n: int | None = None) -> None:
    """Runs the ``n`` oldest computations, all of them by default.

    Raises:
        TrainingError: fewer than ``n`` are waiting.
    """
    count = len(_QUEUE) if n is None else n
    if count > len(_QUEUE):
        raise TrainingError(f"{count} weight gradients asked for, but only {len(_QUEUE)} were put off")
    # As in a backward pass: the inputs still know the graph they came from.
    with torch.no_grad():
        for _ in range(count):
            _QUEUE.popleft()()


def discard() -> None:
    """Forgets everything put off, after a step that failed half way."""
    _QUEUE.clear()


# For other schedules, which keep the operands of an output layer in lists of their own.


def drain_embedding_wgrad_compute(
    config: Any,
    embedding_activation_buffer: list[Tensor],
    grad_output_buffer: list[Tensor],
    weight: Tensor,
) -> None:
    """Adds the weight gradients of an output layer that were left for later to ``weight.main_grad``.

    Args:
        config: ``sequence_parallel`` says that activations are this rank's part of the sequence.
        embedding_activation_buffer: inputs of the layer, one per micro-batch, [s, b, h] or [s/TP, b, h].
        grad_output_buffer: gradients of its outputs in the same order, [s, b, v/TP]; both are emptied.
        weight: [v/TP, h]; without a ``main_grad`` its ``grad`` is added to.

    Raises:
        UsageError: buffers of different lengths.
    """
    if len(embedding_activation_buffer) != len(grad_output_buffer):
        raise UsageError(
            f"{len(embedding_activation_buffer)} activations of the output layer but "
            f"{len(grad_output_buffer)} gradients: empty the first buffer with "
            "clear_embedding_activation_buffer() before each step"
        )
    with torch.no_grad():
        while grad_output_buffer:
            x, grad_output = embedding_activation_buffer.pop(0), grad_output_buffer.pop(0)
            whole = _gather_along_first_dim(x) if config.sequence_parallel else x
            operands = prepare_input_tensors_for_wgrad_compute(grad_output, whole)
            main_grad = getattr(weight, "main_grad", None)
            if main_grad is not None:
                accumulate_weight_gradient(main_grad, *operands)
                mark(weight, grad_added_to_main_grad=True)
            else:
                grad = weight_gradient(*operands)
                weight.grad = grad if weight.grad is None else weight.grad + grad
