"""Collectives that deliver as late as a device's do: results arrive when they are waited for, not before.

Under gloo a result is often there before anybody waits, and a buffer that is written too early has often been
sent already. Where communication has a stream of its own neither holds. In :func:`delivered_late`

* the result of an asynchronous operation is NaN until its work has been waited for (or has been asked often
  whether it is done);
* what was handed over must be the same then, and nobody may have written into the result's place;
* sending and receiving one by one takes place in the order of the calls, as on the one stream that two
  neighbours share; a batch is one work, as under NCCL;
* a work that nobody waited for and that was not done is reported.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

# Function of torch.distributed, two of which depend on its version -> positions of (result, operand).
_COLLECTIVES = {
    "all_reduce": (0, 0),
    "all_gather_into_tensor": (0, 1),
    "all_gather_single": (0, 1),
    "reduce_scatter_tensor": (0, 1),
    "reduce_scatter_single": (0, 1),
}
# Questions whether a work is done, until the answer is yes.
_POLLS = 3


class LateWork:
    """An operation under way.

    Args:
        name: for messages.
        results: places of what is to come, with what will be there.
        operands: what was handed over.
        report: takes messages about wrong use.
    """

    def __init__(
        self,
        name: str,
        results: list[tuple[Tensor, Tensor]],
        operands: list[Tensor],
        report: Callable[[str], None],
    ):
        self._name, self._results, self._report = name, results, report
        for place, _ in results:
            place.fill_(torch.nan if place.is_floating_point() else torch.iinfo(place.dtype).min)
        # After that: a result may lie inside its operand, whose rest is not to be touched either.
        self._kept = [(tensor, tensor.clone()) for tensor in [*operands, *(place for place, _ in results)]]
        self._polls, self.done = 0, False

    def is_completed(self) -> bool:
        self._polls += 1
        if self._polls >= _POLLS:
            self.wait()
        return self.done

    def wait(self, *unused: Any) -> bool:
        if self.done:
            return True
        self.done = True
        for tensor, before in self._kept:
            if not torch.equal(tensor.reshape(-1).view(torch.uint8), before.reshape(-1).view(torch.uint8)):
                self._report(f"{self._name}: a tensor of {tuple(tensor.shape)} was written to under way")
        for place, value in self._results:
            place.copy_(value)
        self._kept, self._results = [], []
        return True

    def __del__(self) -> None:
        if not self.done:
            self._report(f"{self._name}: nobody waited for it")


@contextlib.contextmanager
def delivered_late() -> Iterator[dict[str, int]]:
    """Makes this rank's asynchronous operations late; yields their number by name.

    Raises:
        AssertionError: at the end, if one of them was used wrongly.
    """
    problems: list[str] = []
    counts: dict[str, int] = {}

    def start(name: str, results: Any, operands: list[Tensor]) -> LateWork:
        counts[name] = counts.get(name, 0) + 1
        return LateWork(name, results, operands, problems.append)

    send, receive, p2p_op = dist.isend, dist.irecv, dist.P2POp

    def isend(tensor: Tensor, dst: int, group: Any = None, tag: int = 0) -> LateWork:
        send(tensor.clone(), dst, group=group, tag=tag).wait()
        return start("isend", [], [tensor])

    def irecv(tensor: Tensor, src: int, group: Any = None, tag: int = 0) -> LateWork:
        value = torch.empty_like(tensor)
        receive(value, src, group=group, tag=tag).wait()
        return start("irecv", [(tensor, value)], [])

    def batch(operations: list[Any]) -> list[LateWork]:
        copies = [
            (each, each.tensor.clone(), send if each.op is dist.distributed_c10d.isend else receive)
            for each in operations
        ]
        for work in [op(copy, each.peer, group=each.group) for each, copy, op in copies]:
            work.wait()
        results = [(each.tensor, copy) for each, copy, op in copies if op is receive]
        return [start("batch", results, [each.tensor for each, _, op in copies if op is send])]

    def operation(op: Any, *args: Any, **kwargs: Any) -> dist.P2POp:
        # Torch knows the two functions of a batch by identity.
        return p2p_op({isend: send, irecv: receive}[op], *args, **kwargs)

    replaced = {"isend": isend, "irecv": irecv, "P2POp": operation, "batch_isend_irecv": batch}
    for name, positions in _COLLECTIVES.items():
        if hasattr(dist, name):
            replaced[name] = _late(name, positions, getattr(dist, name), start)
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(dist, name, function))
        yield counts
    assert not problems, sorted(set(problems))


def _late(name: str, positions: tuple[int, int], function: Callable, start: Callable) -> Callable:
    def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        if not async_op:
            return function(*args, **kwargs)
        place, operand = (args[position] for position in positions)
        value = torch.empty_like(place) if operand is not place else place.clone()
        function(value, *([] if operand is place else [operand.clone()]), **kwargs)
        shares = operand.untyped_storage().data_ptr() == place.untyped_storage().data_ptr()
        inside = shares and operand.numel() <= place.numel()
        return start(name, [(place, value)], [] if inside else [operand])

    return call
