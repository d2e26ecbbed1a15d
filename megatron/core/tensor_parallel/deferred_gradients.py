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

import torch

from megatron.core.errors import TrainingError

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
