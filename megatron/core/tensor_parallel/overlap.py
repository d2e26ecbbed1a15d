"""How the matmuls of a split layer overlap with the collectives before or after them, if they do.

A layer that gathers its input, or sums its output over the ranks, has nothing to compute until the whole has
arrived, or nothing to send until the whole is computed. Cut into N chunks, all but one N-th of the traffic
goes on behind matmuls (Wang et al. 2023, "Overlap Communication with Dependent Computation via
Decomposition in Large Deep Learning Models"). The bytes stay the same, in N times as many messages, so small
layers do not gain.

Under sequence parallelism a chunk is cut from every rank's part of the sequence: what is gathered for chunk i
are the i-th pieces of all parts, and what is summed for it goes to the i-th piece of each part.
"""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import collectives, overrides, parallel_state
from megatron.core.collectives import PendingResult, group_size
from megatron.core.fusions import matmul
from megatron.core.fusions.matmul import as_rows, linear_forward
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.utils import divide

# Scratch memory of pieces that have arrived. They are used up before the function that gathers them returns.
_GATHERED_PIECES = "chunked_overlap"


class OverlappedMatmuls(Protocol):
    """Matmuls with the traffic before or after them; :class:`ChunkedMatmuls` says what arguments are."""

    def gather_then_multiply(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None, group: ProcessGroup | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]: ...

    def multiply_then_reduce(
        self, x: Tensor, matrix: Tensor, group: ProcessGroup | None, scatter: bool
    ) -> PendingResult: ...


class ChunkedMatmuls:
    """Matmuls whose traffic overlaps with them in ``chunks`` pieces.

    Rows that do not divide make pieces that differ by one; fewer rows than chunks make a piece each.
    """

    def __init__(self, chunks: int):
        self.chunks = chunks

    def gather_then_multiply(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None, group: ProcessGroup | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Joins the ranks' parts along the first dimension and multiplies them.

        All gathers start at once; each matmul waits for its own.

        Args:
            x: [s/TP, ..., k], this rank's part.
            matrix: [k, n].
            bias: [n], or None.
            group: ranks that hold the parts.
            keep: return what was gathered as well.

        Returns:
            [s, ..., n], and [s, ..., k] or None.
        """
        x, ranks = x.contiguous(), group_size(group)
        shape = [x.shape[0] * ranks, *x.shape[1:]]
        scratch = parallel_state.get_global_memory_buffer().get_tensor(shape, x.dtype, _GATHERED_PIECES)
        pieces = list(self._pieces(x.shape[0]))
        works = []
        for first, last in pieces:
            # [c, ..., k] -> [TP * c, ..., k]
            works.append(
                collectives.all_gather(scratch[ranks * first : ranks * last], x[first:last], group, True)
            )
        out: Tensor | None = None
        whole = x.new_empty(ranks, *x.shape) if keep else None
        for (first, last), work in zip(pieces, works, strict=True):
            if work is not None:
                work.wait()
            gathered = scratch[ranks * first : ranks * last]
            y = linear_forward(gathered, matrix.t(), bias)
            if out is None:
                out = y.new_empty(ranks, x.shape[0], *y.shape[1:])
            # [TP * c, ..., n] -> [TP, c, ..., n]: the rows of a rank's part lie together in the whole
            out[:, first:last] = y.unflatten(0, (ranks, last - first))
            if whole is not None:
                whole[:, first:last] = gathered.unflatten(0, (ranks, last - first))
        assert out is not None, "there is always a piece"
        return out.flatten(0, 1), None if whole is None else whole.flatten(0, 1)

    def multiply_then_reduce(
        self, x: Tensor, matrix: Tensor, group: ProcessGroup | None, scatter: bool
    ) -> PendingResult:
        """Sums ``x matrix`` over the ranks; the last sums are still under way when this returns.

        Args:
            x: [s, ..., k].
            matrix: [k, n].
            group: ranks whose matmuls are summed.
            scatter: leave every rank its part of the first dimension; otherwise all get the whole sum.

        Returns:
            [s/TP, ..., n] or [s, ..., n].
        """
        parts = group_size(group) if scatter else 1
        length = divide(x.shape[0], parts)
        # [s, ..., k] -> [TP, s/TP, ..., k]
        cut = x.unflatten(0, (parts, length))
        result: Tensor | None = None
        sending: PendingResult | None = None
        for first, last in self._pieces(length):
            # [TP, c, ..., k] -> [TP * c, ..., k]
            partial = linear_forward(cut[:, first:last].flatten(0, 1), matrix.t())
            if result is None or sending is None:
                result = partial.new_empty(length, *partial.shape[1:])
                sending = PendingResult(result)
            piece = result[first:last]
            if scatter:
                sending.add(collectives.reduce_scatter(piece, partial, group, async_op=True), partial)
            else:
                piece.copy_(partial)
                sending.add(collectives.all_reduce(piece, group, async_op=True))
        assert sending is not None, "there is always a piece"
        return sending

    def _pieces(self, length: int) -> Iterator[tuple[int, int]]:
        """First row of each piece, and the one after its last."""
        count = max(1, min(self.chunks, length))
        for number in range(count):
            yield number * length // count, (number + 1) * length // count


class FusedMatmuls:
    """Matmuls that the device's kernels fuse with the traffic of sequence parallelism."""

    def gather_then_multiply(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None, group: ProcessGroup | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[s/TP, b, k], [k, n] -> [s, b, n], and [s, b, k] or None"""
        out, whole = matmul.all_gather_matmul(as_rows(x), matrix, group, keep)
        if bias is not None:
            out = out + bias
        inner = x.shape[1:-1]
        return out.view(-1, *inner, out.shape[1]), None if whole is None else whole.view(-1, *x.shape[1:])

    def multiply_then_reduce(
        self, x: Tensor, matrix: Tensor, group: ProcessGroup | None, scatter: bool
    ) -> PendingResult:
        """[s, b, k], [k, n] -> [s/TP, b, n]"""
        assert scatter, "there is no fused kernel for sums that all ranks get"
        out = matmul.matmul_reduce_scatter(as_rows(x), matrix, group)
        return PendingResult(out.view(-1, *x.shape[1:-1], out.shape[1]))


def overlap_of(config: ModelParallelConfig) -> OverlappedMatmuls | None:
    """What the config asks for and the device can do; None for whole matmuls and separate traffic.

    Fused kernels exist for sequence parallelism only, and come before chunks where both are asked for.
    """
    fused = config.tp_comm_fused_matmul and config.sequence_parallel
    if fused and overrides.is_replaced(matmul.all_gather_matmul):
        return FusedMatmuls()
    return ChunkedMatmuls(config.tp_comm_chunks) if config.tp_comm_chunks > 1 else None
