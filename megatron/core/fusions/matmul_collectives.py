"""Products together with the traffic of tensor and sequence parallelism.

A device may have kernels that send one part of an operand or a result while they multiply another. There is
no derivative: callers are autograd functions, and each of the two functions is in the backward of the other.
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.overrides import overridable
from megatron.core.tensor_parallel import collectives
from megatron.core.tensor_parallel.collectives import group_size
from megatron.core.tensor_parallel.products import product
from megatron.core.utils import divide


@overridable
def all_gather_matmul(
    x: Tensor, matrix: Tensor, group: ProcessGroup, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Joins the ranks' rows in the order of the ranks and multiplies them.

    x: [m, k], this rank's rows; matrix: [k, n], contiguous or a transposed view; both of one dtype.
    -> [m * ranks, n], and what was gathered, [m * ranks, k], or None unless ``keep``.
    """
    whole = x.new_empty(x.shape[0] * group_size(group), x.shape[1])
    collectives.all_gather(whole, x, group)
    return product(whole, matrix.t()), whole if keep else None


@overridable
def matmul_reduce_scatter(x: Tensor, matrix: Tensor, group: ProcessGroup) -> Tensor:
    """Sums ``x matrix`` over the ranks; rank r gets part r of the rows.

    x: [m, k], with m a multiple of the number of ranks; matrix: [k, n], contiguous or a transposed view; both
    of one dtype. -> [m / ranks, n]
    """
    partial = product(x, matrix.t())
    out = partial.new_empty(divide(x.shape[0], group_size(group)), matrix.shape[1])
    collectives.reduce_scatter(out, partial, group)
    return out
