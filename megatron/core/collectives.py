"""Collectives over a process group, the same on every back end; a group of one rank has nothing to send.

The only place that knows how ``torch.distributed`` calls its operations in this version, and what a back end
lacks: gloo cannot gather pieces of different lengths, so those are padded to the longest.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, Work

from megatron.core import parallel_state

# Newer versions of torch warn about the older names.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)
# Under the names that other projects import them by.
dist_all_gather_func = getattr(dist, _ALL_GATHER)
dist_reduce_scatter_func = getattr(dist, _REDUCE_SCATTER)


def tensor_group(group: ProcessGroup | None = None) -> ProcessGroup | None:
    """``group``, by default the tensor-parallel group; None where there are no groups."""
    return group if group is not None else parallel_state.get_tensor_model_parallel_group(False)


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks in ``group``; 1 for None."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: ProcessGroup | None) -> int:
    """This process's place in ``group``; 0 for None."""
    return 0 if group is None else dist.get_rank(group)


def all_reduce(
    tensor: Tensor, group: ProcessGroup | None, op: ReduceOp.RedOpType = ReduceOp.SUM, async_op: bool = False
) -> Work | None:
    """Reduces the contiguous ``tensor`` over the ranks, in place; returns what to wait for, if anything."""
    if group_size(group) == 1:
        return None
    return dist.all_reduce(tensor, op=op, group=group, async_op=async_op)


def all_gather(
    output: Tensor, input_: Tensor, group: ProcessGroup | None, async_op: bool = False
) -> Work | None:
    """Joins every rank's ``input_`` [n, ...] along the first dimension in ``output`` [n * ranks, ...]."""
    if group_size(group) == 1:
        output.copy_(input_)
        return None
    return getattr(dist, _ALL_GATHER)(output, input_.contiguous(), group=group, async_op=async_op)


def reduce_scatter(
    output: Tensor,
    input_: Tensor,
    group: ProcessGroup | None,
    op: ReduceOp.RedOpType = ReduceOp.SUM,
    async_op: bool = False,
) -> Work | None:
    """Reduces ``input_`` [n * ranks, ...] over the ranks; rank r gets part r of it in ``output`` [n, ...].

    An asynchronous caller keeps ``input_`` (contiguous) alive until the work is done.
    """
    if group_size(group) == 1:
        output.copy_(input_)
        return None
    return getattr(dist, _REDUCE_SCATTER)(output, input_.contiguous(), op=op, group=group, async_op=async_op)


class PendingResult:
    """A result that asynchronous collectives are still writing; keeps what they send."""

    def __init__(self, result: Tensor):
        self._result = result
        self._works: list[Work] = []
        self._sources: list[Tensor] = []

    def add(self, work: Work | None, *sources: Tensor) -> None:
        """Notes a collective that writes into the result, if there is one, and what it reads."""
        if work is not None:
            self._works.append(work)
            self._sources += sources

    def wait(self) -> Tensor:
        """The result, to be read from now on."""
        for work in self._works:
            work.wait()
        self._works, self._sources = [], []
        return self._result


def all_gather_uneven(input_: Tensor, sizes: list[int], group: ProcessGroup | None) -> Tensor:
    """Joins every rank's ``input_`` [sizes[rank], ...] along the first dimension.  -> [sum(sizes), ...]"""
    longest = max(sizes)
    padded = input_.new_zeros(longest, *input_.shape[1:])
    padded[: input_.shape[0]] = input_
    gathered = input_.new_empty(len(sizes) * longest, *input_.shape[1:])
    all_gather(gathered, padded, group)
    return torch.cat([part[:size] for part, size in zip(gathered.split(longest), sizes, strict=True)])


def reduce_scatter_uneven(input_: Tensor, sizes: list[int], group: ProcessGroup | None) -> Tensor:
    """Sums ``input_`` [sum(sizes), ...] over the ranks; rank r gets its part.  -> [sizes[r], ...]"""
    longest = max(sizes)
    padded = input_.new_zeros(len(sizes), longest, *input_.shape[1:])
    for row, part in zip(padded, input_.split(sizes), strict=True):
        row[: part.shape[0]] = part
    mine = input_.new_empty(longest, *input_.shape[1:])
    reduce_scatter(mine, padded.flatten(0, 1), group)
    return mine[: sizes[group_rank(group)]]


def exchange(
    input_: Tensor,
    group: ProcessGroup | None,
    output_sizes: list[int] | None = None,
    input_sizes: list[int] | None = None,
) -> Tensor:
    """Sends part r of ``input_`` to rank r and joins what arrives, along the first dimension.

    Args:
        input_: [sum(input_sizes), ...].
        group: ranks that take part.
        output_sizes, input_sizes: lengths of the parts from and to every rank; equal parts by default.
    """
    if group_size(group) == 1:
        return input_
    length = input_.shape[0] if output_sizes is None else sum(output_sizes)
    output = input_.new_empty(length, *input_.shape[1:])
    dist.all_to_all_single(
        output,
        input_.contiguous(),
        output_split_sizes=output_sizes,
        input_split_sizes=input_sizes,
        group=group,
    )
    return output
