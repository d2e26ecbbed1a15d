"""Bringing a batch from the rank that read it to its tensor-parallel partners."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron.core import accelerator, parallel_state
from megatron.core.errors import DataError, NotBuiltYetError

MAX_DIMENSIONS = 5


def broadcast_data(keys: Iterable[str], data: dict[str, Tensor], datatype: torch.dtype) -> dict[str, Tensor]:
    """The named tensors of ``data``, on the device of every tensor-parallel rank.

    Args:
        keys: which entries to take.
        data: read on tensor-parallel rank 0; others may pass None.
        datatype: dtype that all of them must have.

    Raises:
        DataError: a missing entry, another dtype, or more than 5 dimensions.
    """
    if parallel_state.model_parallel_is_initialized():
        size = parallel_state.get_tensor_model_parallel_world_size()
        if size > 1:
            raise NotBuiltYetError(
                "sending a batch to tensor-parallel ranks", f"--tensor-model-parallel-size {size}", "Use 1."
            )
    device = accelerator.current_device()
    return {key: _checked(data, key, datatype).to(device, non_blocking=True) for key in keys}


def _checked(data: dict[str, Tensor], key: str, datatype: torch.dtype) -> Tensor:
    if key not in data:
        raise DataError(f"batch has no {key!r}; it has {', '.join(sorted(data)) or 'nothing'}")
    tensor = data[key]
    if tensor.dtype != datatype:
        raise DataError(f"batch entry {key!r} is {tensor.dtype}, expected {datatype}")
    if tensor.dim() > MAX_DIMENSIONS:
        raise DataError(
            f"batch entry {key!r} has {tensor.dim()} dimensions, at most {MAX_DIMENSIONS} can be sent"
        )
    return tensor
