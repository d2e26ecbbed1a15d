"""Matmuls of one expert after the other, and with the collectives of tensor and sequence parallelism ("MC2").

All MC2 kernels of one model have to use one communicator on a 910B. They do: only layers under sequence
parallelism come here, and their group is the tensor-parallel one.
"""

import os
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_npu import chip
from megatron_npu.registry import replaces

_POINTS = "megatron.core.fusions.matmul."
_MOST_EXPERTS = 1024
_WIDEST = 65535
_GROUPED_LIMITS = f"no rows, more than {_MOST_EXPERTS} experts, more than {_WIDEST} channels"
# One result, not one for each expert.
_ONE_RESULT = 3
_BY_ROW_OF_X, _BY_SUMMED_ROW = 0, 2
_GROUPED_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_HALF = (torch.float16, torch.bfloat16)
_INNER = range(256, 65535)
_MC2_LIMITS = (
    "runs without --use-ascend-mc2, fp32, inner sizes below 256 or beyond 65534, other than 2, 4, 8 ranks "
    "(910_93: or 16) of one machine"
)


def _why_not_shape(rows: int, experts: int, *widths: int) -> str | None:
    if not rows:
        return "no rows"
    if experts > _MOST_EXPERTS:
        return f"more than {_MOST_EXPERTS} experts"
    return f"more than {_WIDEST} channels" if max(widths) > _WIDEST else None


def _why_host_counts() -> str | None:
    """The first releases took the ends as a list of the host's, for which it would have to wait."""
    packet = torch.ops.npu.npu_grouped_matmul
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    types = {str(argument.type) for s in schemas for argument in s.arguments if argument.name == "group_list"}
    return (
        None if "Optional[Tensor]" in types else "npu_grouped_matmul of this torch_npu takes no device counts"
    )


def _ends(tokens_per_expert: Tensor, device: torch.device) -> Tensor:
    return tokens_per_expert.to(device, torch.int64).cumsum(0)


@replaces(
    _POINTS + "grouped_mm",
    operators=("npu_grouped_matmul",),
    since="6.0.rc1",
    chips=chip.FROM_910B,
    only_if=_why_host_counts,
    unless=lambda x, weight, tokens_per_expert: _why_not_shape(len(x), *weight.shape),
    limits=_GROUPED_LIMITS,
    bound=_GROUPED_BOUND,
)
def grouped_mm(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """The operator takes transposed weights, but no transposed rows."""
    return torch.ops.npu.npu_grouped_matmul(
        [x.contiguous()],
        [weight],
        group_list=_ends(tokens_per_expert, x.device),
        split_item=_ONE_RESULT,
        group_type=_BY_ROW_OF_X,
    )[0]


@replaces(
    _POINTS + "grouped_weight_gradient",
    operators=("npu_grouped_matmul",),
    since="6.0.rc1",
    chips=chip.FROM_910B,
    only_if=_why_host_counts,
    unless=lambda x, grad_output, tokens_per_expert: _why_not_shape(
        len(x), len(tokens_per_expert), x.shape[1], grad_output.shape[1]
    ),
    limits=_GROUPED_LIMITS,
    bound=_GROUPED_BOUND,
)
def grouped_weight_gradient(x: Tensor, grad_output: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """The documents do not say what an expert without rows gets, so its zeros are written here."""
    ends = _ends(tokens_per_expert, x.device)
    grads = torch.ops.npu.npu_grouped_matmul(
        [x.contiguous().t()],
        [grad_output.contiguous()],
        group_list=ends,
        split_item=_ONE_RESULT,
        group_type=_BY_SUMMED_ROW,
    )[0]
    return grads.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0).view(-1, 1, 1), 0.0)


def _cannot_add(x: Tensor, grad_output: Tensor, tokens_per_expert: Tensor, main_grad: Tensor) -> str | None:
    if main_grad.dtype != torch.float32:
        return "other sums than fp32"
    return _why_not_shape(len(x), len(tokens_per_expert), x.shape[1], grad_output.shape[1])


@replaces(
    _POINTS + "accumulate_grouped_weight_gradient",
    operators=("npu_grouped_matmul_add_",),
    since="7.1.0",
    chips=chip.FROM_910B,
    dtypes=(torch.float16, torch.bfloat16),
    unless=_cannot_add,
    limits=f"fp32 operands, other sums than fp32, {_GROUPED_LIMITS}",
    bound=_GROUPED_BOUND,
    note="matmuls are added as fp32; the default rounds them to the type of the operands first",
)
def accumulate_grouped_weight_gradient(
    x: Tensor, grad_output: Tensor, tokens_per_expert: Tensor, main_grad: Tensor
) -> None:
    """The operator transposes the rows itself."""
    torch.ops.npu.npu_grouped_matmul_add_(
        main_grad, x.contiguous(), grad_output.contiguous(), _ends(tokens_per_expert, x.device)
    )


def _unsuitable_for_mc2(x: Tensor, matrix: Tensor, group: ProcessGroup) -> str | None:
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
    return cast(Any, group._get_backend(torch.device("npu"))).get_hccl_comm_name(dist.get_rank())


@replaces(
    _POINTS + "all_gather_matmul",
    operators=("npu_all_gather_base_mm",),
    since="5.0.0",
    chips=chip.FROM_910B_TO_910_93,
    dtypes=_HALF,
    unless=lambda x, matrix, group, keep: _unsuitable_for_mc2(x, matrix, group),
    limits=_MC2_LIMITS,
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
    _POINTS + "matmul_reduce_scatter",
    operators=("npu_mm_reduce_scatter_base",),
    since="5.0.0",
    chips=chip.FROM_910B_TO_910_93,
    dtypes=_HALF,
    unless=_unsuitable_for_mc2,
    limits=_MC2_LIMITS,
    bound={torch.float16: 2e-3, torch.bfloat16: 1e-2},
)
def matmul_reduce_scatter(x: Tensor, matrix: Tensor, group: ProcessGroup) -> Tensor:
    """Callers cut sequences into equal parts, so the rows divide by the ranks as the operator wants."""
    return torch.ops.npu.npu_mm_reduce_scatter_base(
        x.contiguous(), matrix, _communicator(group), dist.get_world_size(group)
    )
