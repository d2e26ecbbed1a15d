"""Operations on lists of tensors with the calling convention of the fused multi-tensor kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def local_multi_tensor_applier(
    op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: list[list[Tensor]], *args: Any
) -> Any:
    """Calls ``op`` as the fused applier does, with a chunk size that these operations do not need."""
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def local_multi_tensor_l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *args: Any
) -> tuple[Tensor, Tensor | None]:
    """Euclidean norm of all tensors of the first list together, and of each if ``per_tensor`` (fp32)."""
    norms = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in tensor_lists[0]])
    return torch.linalg.vector_norm(norms).reshape(1), norms if per_tensor else None


def local_multi_tensor_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float
) -> tuple[None, None]:
    """Writes ``source * scale`` into the destinations: ``tensor_lists = [sources, destinations]``."""
    sources, destinations = tensor_lists
    for source, destination in zip(sources, destinations, strict=True):
        destination.copy_(source * scale)
    return None, None
