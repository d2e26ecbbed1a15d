"""Ranks that make a comparison together, when a launcher has started several of them."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from megatron.core import accelerator


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Context in which the ranks of this launch are one process group, for NPU tensors and for CPU tensors.

    Without a launcher, or with one rank, there is no group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,npu:hccl")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is the rank that speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0
