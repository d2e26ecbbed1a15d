"""What a rank hands to ``torch.distributed``: calls and bytes of each operation, by the ranks it reaches.

Counted where the library calls ``torch.distributed``, and once more below it, where torch hands messages to
its process groups, so that nothing passes unseen.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# Function of torch.distributed -> (operation, position of the tensor whose bytes count, its name). Two
# functions depend on the version of torch. A gather counts its result, a scatter its source: the whole.
_FUNCTIONS = {
    "all_reduce": ("all_reduce", 0, "tensor"),
    "broadcast": ("broadcast", 0, "tensor"),
    "all_gather_into_tensor": ("all_gather", 0, "output_tensor"),
    "all_gather_single": ("all_gather", 0, "output_tensor"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input"),
    "reduce_scatter_single": ("reduce_scatter", 1, "input"),
    "all_to_all_single": ("all_to_all", 1, "input"),
}
# Counted by their calls alone: a training step has no use for them.
_OTHERS = (
    "all_gather",
    "all_gather_object",
    "all_to_all",
    "barrier",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "reduce",
    "reduce_scatter",
    "scatter",
    "scatter_object_list",
    "send",
)


@dataclass(frozen=True, order=True)
class Kind:
    """An operation over some global ranks; ``send`` goes to the one rank named."""

    operation: str
    ranks: tuple[int, ...]


@dataclass
class Amount:
    """How often, and how many bytes in all."""

    calls: int = 0
    total_bytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.calls + other.calls, self.total_bytes + other.total_bytes)

    def __mul__(self, times: int) -> "Amount":
        return Amount(self.calls * times, self.total_bytes * times)


Traffic = dict[Kind, Amount]


def one(operation: str, ranks: tuple[int, ...], *sizes: int) -> Traffic:
    """Traffic of one call for each of ``sizes`` (bytes)."""
    return {Kind(operation, ranks): Amount(len(sizes), sum(sizes))} if sizes else {}


def add(*parts: Traffic) -> Traffic:
    """All parts together."""
    total: Traffic = {}
    for part in parts:
        for kind, amount in part.items():
            total[kind] = total.get(kind, Amount()) + amount
    return total


def times(part: Traffic, count: int) -> Traffic:
    """``part``, ``count`` times over."""
    return {kind: amount * count for kind, amount in part.items() if count}


class Meter:
    """Adds up what this rank sends; ``take`` empties it."""

    messages: "_Messages"

    def __init__(self) -> None:
        self._counted: Traffic = {}

    def note(self, operation: str, ranks: tuple[int, ...], size: int) -> None:
        self._counted = add(self._counted, one(operation, ranks, size))

    def take(self) -> Traffic:
        """What was counted since the last time.

        Raises:
            AssertionError: more or fewer messages reached the process groups than were counted above them.
        """
        taken, self._counted = self._counted, {}
        calls, self.messages.calls = self.messages.calls, 0
        counted = sum(amount.calls for amount in taken.values())
        assert calls == counted, f"{calls} messages were sent, {counted} of them by known functions"
        return taken


class _Messages(TorchDispatchMode):
    """Counts what reaches the process groups, whoever sent it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and "recv" not in function.name():
            self.calls += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def metered() -> Iterator[Meter]:
    """Meter of everything in the context."""
    meter = Meter()
    with contextlib.ExitStack() as stack:

        def replace(name: str, function: Callable) -> None:
            stack.enter_context(mock.patch.object(dist, name, function))

        for name, (operation, position, keyword) in _FUNCTIONS.items():
            if hasattr(dist, name):
                replace(name, _counting(meter, operation, position, keyword, getattr(dist, name)))
        isend, p2p_op = dist.isend, dist.P2POp
        replace("isend", _counting_isend(meter, isend))
        replace("batch_isend_irecv", _counting_batch(meter, dist.batch_isend_irecv))
        # An operation of a batch is named by the function itself.
        counting = dist.isend
        replace("P2POp", lambda op, *args, **kw: p2p_op(isend if op is counting else op, *args, **kw))
        for name in _OTHERS:
            replace(name, _counting_calls(meter, name, getattr(dist, name)))
        meter.messages = stack.enter_context(_Messages())
        yield meter


def _counting(meter: Meter, operation: str, position: int, keyword: str, function: Callable) -> Callable:
    def count(*args: Any, **kwargs: Any) -> Any:
        tensor = args[position] if len(args) > position else kwargs[keyword]
        group = kwargs.get("group")
        meter.note(operation, tuple(dist.get_process_group_ranks(group or dist.group.WORLD)), tensor.nbytes)
        return function(*args, **kwargs)

    return count


def _counting_calls(meter: Meter, name: str, function: Callable) -> Callable:
    def count(*args: Any, **kwargs: Any) -> Any:
        meter.note(name, (), 0)
        return function(*args, **kwargs)

    return count


def _counting_isend(meter: Meter, function: Callable) -> Callable:
    def count(tensor: torch.Tensor, dst: int, **kwargs: Any) -> Any:
        meter.note("send", (dst,), tensor.nbytes)
        return function(tensor, dst, **kwargs)

    return count


def _counting_batch(meter: Meter, function: Callable) -> Callable:
    def count(operations: list[dist.P2POp]) -> Any:
        for each in operations:
            if each.op is dist.distributed_c10d.isend:
                meter.note("send", (each.peer,), each.tensor.nbytes)
        return function(operations)

    return count
