"""Test calls of replaceable functions, written once and run in any type on any device.

Operands are drawn in fp64. A tensor drawn in fp64 takes the type under test; one in fp32 is fp32 whatever the
type (a loss scale, a log-sum-exp); others stay as they are. The reference gets the same rounded numbers in
fp64, so that it differs from the function under test by arithmetic alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only


class Draw:
    """Random operands, the same for the same case."""

    def __init__(self, seed: int = 1):
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """fp64 with standard deviation 1."""
        return torch.randn(*shape, generator=self._generator, dtype=torch.float64)

    def positive(self, *shape: int) -> Tensor:
        """fp64 in 0..1."""
        return torch.rand(*shape, generator=self._generator, dtype=torch.float64)

    def masked(self, *shape: int, fraction: float = 0.3) -> Tensor:
        """Bool, True for a fraction."""
        return torch.rand(*shape, generator=self._generator) < fraction

    def ids(self, *shape: int, below: int, ignored: float = 0.0) -> Tensor:
        """int64 in 0..below-1, and -1 for a fraction."""
        ids = torch.randint(below, shape, generator=self._generator)
        return ids.masked_fill(torch.rand(shape, generator=self._generator) < ignored, -1)


@dataclass
class Call:
    """Arguments, and the positions of those whose gradients are compared."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[int, ...] = ()


def results(result: Any, call: Call) -> list[Tensor]:
    """What a function returned, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


@dataclass(frozen=True)
class Case:
    """One call of one point.

    Attributes:
        path: the point.
        name: what is special about it.
        make: the call, from a source of operands.
        observe: tensors to compare, from the result and the call (for functions that write in place).
        pinned: fp32 operands stay fp32 in the reference as well.
        dtypes: types to try; None for all that the replacement takes.
        among_ranks: all ranks of the default process group make the call, each with its own operands, and
            get the group as ``group``.
    """

    path: str
    name: str
    make: Callable[[Draw], Call]
    observe: Callable[[Any, Call], list[Tensor]] = results
    pinned: bool = False
    dtypes: tuple[torch.dtype, ...] | None = None
    among_ranks: bool = False

    def call(self, dtype: torch.dtype, device: torch.device | str) -> Call:
        """The call in a type on a device."""
        return self._converted(lambda t: t.to(dtype) if t.dtype == torch.float64 else t, device)

    def reference_call(self, dtype: torch.dtype) -> Call:
        """The call on the CPU in fp64, with operands rounded to the type first."""

        def widen(t: Tensor) -> Tensor:
            if t.dtype == torch.float64:
                return t.to(dtype).to(torch.float64)
            return t if self.pinned or not t.is_floating_point() else t.to(torch.float64)

        return self._converted(widen, "cpu")

    def _converted(self, change: Callable[[Tensor], Tensor], device: torch.device | str) -> Call:
        drawn = self.make(Draw(1 + dist.get_rank() if self.among_ranks else 1))
        if self.among_ranks:
            drawn.kwargs["group"] = dist.group.WORLD
        args, kwargs = tree_map_only(
            Tensor, lambda t: change(t).clone().to(device), (drawn.args, drawn.kwargs)
        )
        for position in drawn.wanted:
            args[position].requires_grad_()
        return Call(args, kwargs, drawn.wanted)


def execute(function: Callable[..., Any], case: Case, call: Call) -> tuple[list[Tensor], list[Tensor]]:
    """(results, gradients) of a call; gradients of the results' sum under fixed weights."""
    outputs = case.observe(function(*call.args, **call.kwargs), call)
    leaves = [call.args[position] for position in call.wanted]
    if not leaves:
        return [t.detach() for t in outputs], []
    weights = [t.to(out) for t, out in zip(_weights(outputs), outputs, strict=True)]
    return [t.detach() for t in outputs], list(torch.autograd.grad(outputs, leaves, weights))


def _weights(outputs: list[Tensor]) -> Iterator[Tensor]:
    draw = Draw(seed=2)
    return (draw.normal(*t.shape) for t in outputs)
