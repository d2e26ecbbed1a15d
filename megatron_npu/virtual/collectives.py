"""``hccl`` on virtual NPUs: gloo, on the host memory behind the tensors.

The group itself holds only a backend for NPU tensors, so that a CPU tensor fails as it does under HCCL.
Beside it stands a group of the same ranks with the same gloo for CPU tensors, to which calls are passed on.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch import library as torch_library

from megatron_npu.virtual import operators
from megatron_npu.virtual.host_memory import CPU, Crossing
from megatron_npu.virtual.kernels import matmul_collectives

_HOST = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Reductions that HCCL has no kernel for before the 950, or never.
_NOT_REDUCED = (torch.float64, torch.complex64, torch.complex128)
_GLOO_GROUPS: dict[str, Any] = {}
# Settings that a group was made with, by its name: what HCCL would read; None for a group without options.
SETTINGS: dict[str, dict[str, Any] | None] = {}


def carry_hccl() -> None:
    """Puts gloo behind the backend name ``hccl``."""
    dist.Backend._plugins["HCCL"] = dist.Backend._BackendPlugin(_connect, True)
    library = torch_library.Library("c10d", "IMPL")
    operators.keep(library)
    for name, operator in operators.registered("c10d"):
        library.impl(name, _by_gloo(name, operator), operators.KEY)
    # torch_npu's own hands the list to an HCCL communicator.
    dist.batch_isend_irecv = dist.distributed_c10d.batch_isend_irecv = _one_by_one


def _connect(options: Any, settings: Any) -> dist.ProcessGroupGloo:
    """The backend of a new group; called with what torch hands to a backend's constructor."""
    rank, size = options.group_rank, options.group_size
    SETTINGS[options.group_id] = None if settings is None else dict(settings.hccl_config)
    gloo = dist.ProcessGroupGloo(options.store, rank, size, options.timeout)
    beside = dist.ProcessGroup(options.store, rank, size)
    kind = dist.ProcessGroup.BackendType.GLOO
    beside._set_default_backend(kind)
    beside._register_backend(CPU, kind, gloo)
    _GLOO_GROUPS[options.group_id] = beside.boxed()
    matmul_collectives.register(gloo, beside)
    return gloo


def _by_gloo(name: str, operator: torch._ops.OpOverload) -> Callable[..., Any]:
    reduces = "reduce" in name

    def kernel(*args: Any, **kwargs: Any) -> Any:
        crossing = Crossing(f"hccl {name}")
        passed = [_beside(value) if _is_group(value) else crossing.down(value) for value in args]
        crossing.check()
        if reduces:
            _check_types(name, passed)
        named = {key: _beside(v) if _is_group(v) else crossing.down(v) for key, v in kwargs.items()}
        return crossing.up(operator.redispatch(_HOST, *passed, **named))

    return kernel


def _is_group(value: Any) -> bool:
    return isinstance(value, torch.ScriptObject) and cast(Any, value._type()).name() == "ProcessGroup"


def _beside(group: Any) -> Any:
    return _GLOO_GROUPS[dist.ProcessGroup.unbox(group).group_name]


def _check_types(name: str, values: list[Any]) -> None:
    for value in values:
        if isinstance(value, list):
            _check_types(name, value)
        elif isinstance(value, Tensor) and value.dtype in _NOT_REDUCED:
            raise RuntimeError(f"hccl {name}: HCCL does not reduce {value.dtype}")


def _one_by_one(operations: list[dist.P2POp]) -> list[dist.Work]:
    works = [each.op(each.tensor, each.peer, each.group, each.tag) for each in operations]
    return [work for work in works if work is not None]
