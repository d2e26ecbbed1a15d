"""How a split layer's products overlap with its traffic, if they do."""

from typing import Protocol

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import overrides
from megatron.core.fusions import matmul
from megatron.core.fusions.matmul import as_rows
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.chunked_overlap import ChunkedProducts
from megatron.core.tensor_parallel.collectives import OnItsWay


class OverlappedProducts(Protocol):
    """Products with the traffic before or after them; :class:`ChunkedProducts` says what arguments are."""

    def gather_then_multiply(
        self, x: Tensor, matrix: Tensor, bias: Tensor | None, group: ProcessGroup | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]: ...

    def multiply_then_reduce(
        self, x: Tensor, matrix: Tensor, group: ProcessGroup | None, scatter: bool
    ) -> OnItsWay: ...


class FusedProducts:
    """Products that the device's kernels fuse with the traffic of sequence parallelism."""

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
    ) -> OnItsWay:
        """[s, b, k], [k, n] -> [s/TP, b, n]"""
        assert scatter, "there is no fused kernel for sums that all ranks get"
        out = matmul.matmul_reduce_scatter(as_rows(x), matrix, group)
        return OnItsWay(out.view(-1, *x.shape[1:-1], out.shape[1]))


def overlap_of(config: ModelParallelConfig) -> OverlappedProducts | None:
    """What the config asks for and the device can do; None for whole products and separate traffic.

    Fused kernels exist for sequence parallelism only, and come before chunks where both are asked for.
    """
    fused = config.tp_comm_fused_matmul and config.sequence_parallel
    if fused and overrides.is_replaced(matmul.all_gather_matmul):
        return FusedProducts()
    return ChunkedProducts(config.tp_comm_chunks) if config.tp_comm_chunks > 1 else None
