"""Products that send while they multiply ("MC2"), by gloo.

Products are added up in fp32 and rounded before they are summed over the ranks. Ascend's operators take a
communicator by the name that a backend for NPU tensors tells. Here that is gloo's, which is taught to.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npu.virtual.kernels import kernel

# A 910B lets all such operators of a model use one communicator only.
_USED: set[str] = set()
# The backends are kept, so that each stays one Python object.
_KNOWN: dict[str, tuple[dist.ProcessGroupGloo, dist.ProcessGroup]] = {}


def register(backend: dist.ProcessGroupGloo, group: dist.ProcessGroup) -> None:
    """Gives the communicator of ``backend`` a name.

    Args:
        backend: what a group returns as its backend for NPU tensors.
        group: the same ranks, for CPU tensors.
    """
    _KNOWN[f"communicator {len(_KNOWN)}"] = backend, group
    cast(Any, dist.ProcessGroupGloo).get_hccl_comm_name = _name_of


def group_of(name: str) -> dist.ProcessGroup:
    """The group of a communicator, for CPU tensors."""
    return _KNOWN[name][1]


def _name_of(backend: dist.ProcessGroupGloo, global_rank: int, init_comm: bool = True) -> str:
    assert global_rank == dist.get_rank(), "the communicator wants this process's global rank"
    return next(name for name, (known, _) in _KNOWN.items() if known is backend)


def _check(input: Tensor, x2: Tensor, hcom: str, world_size: int, comm_turn: int, left_out: tuple) -> None:
    assert input.dim() == x2.dim() == 2 and input.shape[1] == x2.shape[0]
    assert input.dtype == x2.dtype and input.dtype in (torch.float16, torch.bfloat16)
    assert 256 <= input.shape[1] < 65535
    assert input.is_contiguous() and (x2.is_contiguous() or x2.t().is_contiguous())
    assert world_size in (2, 4, 8, 16) and world_size == group_of(hcom).size()
    assert comm_turn == 0 and all(each is None for each in left_out)
    _USED.add(hcom)
    assert len(_USED) == 1, f"a second communicator: {_USED}"


def _product(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("mk,kn->mn", x.float(), matrix.float()).to(x.dtype)


@kernel("npu_all_gather_base_mm")
def all_gather_base_mm(
    input: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    gather_index: int = 0,
    gather_output: bool = True,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    _check(input, x2, hcom, world_size, comm_turn, (bias, x1_scale, x2_scale, output_dtype, comm_mode))
    assert gather_index == 0
    parts = [torch.empty_like(input) for _ in range(world_size)]
    group_of(hcom).allgather([parts], [input]).wait()
    whole = torch.cat(parts)
    return _product(whole, x2), whole if gather_output else input.new_empty(0)


@kernel("npu_mm_reduce_scatter_base")
def mm_reduce_scatter_base(
    input: Tensor,
    x2: Tensor,
    hcom: str,
    world_size: int,
    *,
    reduce_op: str = "sum",
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    comm_turn: int = 0,
    output_dtype: torch.dtype | None = None,
    comm_mode: str | None = None,
) -> Tensor:
    _check(input, x2, hcom, world_size, comm_turn, (bias, x1_scale, x2_scale, output_dtype, comm_mode))
    assert reduce_op == "sum" and input.shape[0] % world_size == 0
    group = group_of(hcom)
    total = _product(input, x2)
    group.allreduce([total]).wait()
    return total.chunk(world_size)[group.rank()].clone()
