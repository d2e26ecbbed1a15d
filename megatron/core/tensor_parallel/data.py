"""Bringing a batch from the rank that read it to its tensor-parallel partners."""

from collections.abc import Iterable

import torch
from torch import Tensor

from megatron.core import accelerator, parallel_state
from megatron.core.collectives import group_rank, group_size, tensor_group
from megatron.core.errors import DataError

MAX_DIMENSIONS = _MAX_DATA_DIM = 5
# In the place of the first number of dimensions: the reading rank has found something wrong.
_FAILED = -1


def broadcast_data(
    keys: Iterable[str], data: dict[str, Tensor] | None, datatype: torch.dtype
) -> dict[str, Tensor]:
    """The named tensors of ``data``, on the device of every tensor-parallel rank.

    Their shapes travel first, then all of them in one flat buffer.

    Args:
        keys: which entries to take, the same on all ranks.
        data: read on tensor-parallel rank 0; others may pass None.
        datatype: dtype that all of them must have.

    Raises:
        DataError: a missing entry, another dtype, or more than 5 dimensions; on all ranks alike.
    """
    keys, group = list(keys), tensor_group()
    if not keys:
        return {}
    if group_size(group) == 1:
        device = accelerator.current_device()
        return {key: _checked(data, key, datatype).to(device, non_blocking=True) for key in keys}
    source = parallel_state.get_tensor_model_parallel_src_rank()
    if group_rank(group) == 0:
        return _send(keys, data, datatype, source)
    return _receive(keys, datatype, source)


def _send(
    keys: list[str], data: dict[str, Tensor] | None, datatype: torch.dtype, source: int
) -> dict[str, Tensor]:
    shapes = torch.zeros(len(keys), 1 + MAX_DIMENSIONS, dtype=torch.int64)
    try:
        tensors = [_checked(data, key, datatype) for key in keys]
    except DataError:
        shapes[0, 0] = _FAILED
        _broadcast(shapes.to(accelerator.current_device()), source)
        raise
    for row, tensor in zip(shapes, tensors, strict=True):
        row[: 1 + tensor.dim()] = torch.tensor([tensor.dim(), *tensor.shape])
    device = accelerator.current_device()
    _broadcast(shapes.to(device), source)
    flat = torch.cat([tensor.reshape(-1).to(device, non_blocking=True) for tensor in tensors])
    _broadcast(flat, source)
    return _unpack(keys, flat, [tensor.shape for tensor in tensors])


def _receive(keys: list[str], datatype: torch.dtype, source: int) -> dict[str, Tensor]:
    device = accelerator.current_device()
    table = torch.empty(len(keys), 1 + MAX_DIMENSIONS, dtype=torch.int64, device=device)
    _broadcast(table, source)
    rows = table.tolist()
    if rows[0][0] == _FAILED:
        raise DataError(f"rank {source}, which reads this rank's batches, has no valid one: see its message")
    shapes = [torch.Size(row[1 : 1 + row[0]]) for row in rows]
    flat = torch.empty(sum(shape.numel() for shape in shapes), dtype=datatype, device=device)
    _broadcast(flat, source)
    return _unpack(keys, flat, shapes)


def _broadcast(tensor: Tensor, source: int) -> None:
    torch.distributed.broadcast(tensor, source, group=parallel_state.get_tensor_model_parallel_group())


def _unpack(keys: list[str], flat: Tensor, shapes: list[torch.Size]) -> dict[str, Tensor]:
    pieces = flat.split([shape.numel() for shape in shapes])
    return {key: piece.view(shape) for key, piece, shape in zip(keys, pieces, shapes, strict=True)}


def _checked(data: dict[str, Tensor] | None, key: str, datatype: torch.dtype) -> Tensor:
    if not data or key not in data:
        raise DataError(f"batch has no {key!r}; it has {', '.join(sorted(data or ())) or 'nothing'}")
    tensor = data[key]
    if tensor.dtype != datatype:
        raise DataError(f"batch entry {key!r} is {tensor.dtype}, expected {datatype}")
    if tensor.dim() > MAX_DIMENSIONS:
        raise DataError(
            f"batch entry {key!r} has {tensor.dim()} dimensions, at most {MAX_DIMENSIONS} can be sent"
        )
    return tensor


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _check_data_types(keys: Iterable[str], data: dict[str, Tensor], target_dtype: torch.dtype) -> None:
    """Every named entry is there and has the dtype.

    Raises:
        DataError: one has not.
    """
    for key in keys:
        _checked(data, key, target_dtype)
