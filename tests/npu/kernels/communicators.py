"""Communicators by name, as Ascend's operators take them, where gloo carries the traffic.

A backend for NPU tensors tells the name of its communicator. Here that is gloo's, which is taught to.
"""

import torch
import torch.distributed as dist

# The backends are kept, so that each stays one Python object.
_KNOWN: dict[str, tuple[dist.ProcessGroupGloo, dist.ProcessGroup]] = {}


def register(backend: dist.ProcessGroupGloo, group: dist.ProcessGroup) -> None:
    """Gives the communicator of ``backend`` a name.

    Args:
        backend: what a group returns as its backend for NPU tensors.
        group: the same ranks, for CPU tensors.
    """
    _KNOWN[f"communicator {len(_KNOWN)}"] = backend, group
    dist.ProcessGroupGloo.get_hccl_comm_name = _name_of


def register_gloo(group: dist.ProcessGroup) -> None:
    """Makes gloo's backend of a group the one for NPU tensors as well."""
    gloo = group._get_backend(torch.device("cpu"))
    group._register_backend(torch.device("npu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    register(gloo, group)


def group_of(name: str) -> dist.ProcessGroup:
    """The group of a communicator, for CPU tensors."""
    return _KNOWN[name][1]


def _name_of(backend: dist.ProcessGroupGloo, global_rank: int, init_comm: bool = True) -> str:
    assert global_rank == dist.get_rank(), "the communicator wants this process's global rank"
    return next(name for name, (known, _) in _KNOWN.items() if known is backend)
