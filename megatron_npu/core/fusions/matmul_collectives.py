"""Products together with the traffic of tensor and sequence parallelism ("MC2").

All of one model have to use one communicator on a 910B. They do: only layers under sequence parallelism come
here, and their group is the tensor-parallel one.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_npu import chip
from megatron_npu.registry import replaces

_HALF = (torch.float16, torch.bfloat16)
_INNER = range(256, 65535)
_LIMITS = (
    "runs without --use-ascend-mc2, fp32, inner sizes below 256 or beyond 65534, other than 2, 4, 8 ranks "
    "(910_93: or 16) of one machine"
)


def _unsuitable(x: Tensor, matrix: Tensor, group: ProcessGroup) -> str | None:
    if matrix.shape[0] not in _INNER:
        return "inner sizes below 256 or beyond 65534"
    ranks = dist.get_world_size(group)
    if ranks not in ((2, 4, 8, 16) if chip.is_910_93() else (2, 4, 8)):
        return f"{ranks} ranks"
    return None if _on_one_machine(group) else "ranks on several machines"


def _on_one_machine(group: ProcessGroup) -> bool:
    """As far as the launcher tells; the links that the kernels use end there."""
    on_each = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    return not on_each or len({rank // on_each for rank in dist.get_process_group_ranks(group)}) == 1


def _communicator(group: ProcessGroup) -> str:
    """Name of the group's communicator, which is made now if there is none yet."""
    return group._get_backend(torch.device("npu")).get_hccl_comm_name(dist.get_rank())


@replaces(
    "megatron.core.fusions.matmul_collectives.all_gather_matmul",
    operators=("npu_all_gather_base_mm",),
    since="5.0.0",
    chips=chip.FROM_910B_TO_910_93,
    dtypes=_HALF,
    unless=lambda x, matrix, group, keep: _unsuitable(x, matrix, group),
    limits=_LIMITS,
    bound={torch.float16: 2e-3, torch.bfloat16: 1e-2},
)
def all_gather_matmul(
    x: Tensor, matrix: Tensor, group: ProcessGroup, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The operator takes a transposed view as its second factor, but not as its first."""
    out, whole = torch.ops.npu.npu_all_gather_base_mm(
        x.contiguous(), matrix, _communicator(group), dist.get_world_size(group), gather_output=keep
    )
    return out, whole if keep else None


@replaces(
    "megatron.core.fusions.matmul_collectives.matmul_reduce_scatter",
    operators=("npu_mm_reduce_scatter_base",),
    since="5.0.0",
    chips=chip.FROM_910B_TO_910_93,
    dtypes=_HALF,
    unless=_unsuitable,
    limits=_LIMITS,
    bound={torch.float16: 2e-3, torch.bfloat16: 1e-2},
)
def matmul_reduce_scatter(x: Tensor, matrix: Tensor, group: ProcessGroup) -> Tensor:
    """Callers cut sequences into equal parts, so the rows divide by the ranks as the operator wants."""
    return torch.ops.npu.npu_mm_reduce_scatter_base(
        x.contiguous(), matrix, _communicator(group), dist.get_world_size(group)
    )
