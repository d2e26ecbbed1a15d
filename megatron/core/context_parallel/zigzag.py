"""Which part of a sequence a rank holds: chunks r and 2*size-1-r of 2*size."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import collectives, parallel_state
from megatron.core.errors import ConfigError


def own_place() -> tuple[int, int]:
    """This process's (rank, size) among those that share a sequence; (0, 1) where there are no groups."""
    group = parallel_state.get_context_parallel_group(check_initialized=False)
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def chunks_of_rank(rank: int, size: int) -> tuple[int, int]:
    """The two chunks of ``rank``, in the order it holds them."""
    return rank, 2 * size - 1 - rank


def chunk_length(length: int, size: int) -> int:
    """Positions in a chunk of a sequence of ``length``.

    Raises:
        ConfigError: the sequence does not divide into 2 * size equal chunks.
    """
    if length % (2 * size):
        fitting = -(-length // (2 * size)) * 2 * size
        raise ConfigError(
            f"a sequence of {length} does not divide into 2 x {size} chunks for "
            f"context_parallel_size {size}: use a multiple of {2 * size}, such as sequence_length {fitting}"
        )
    return length // (2 * size)


def take_chunks(t: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """The part of ``rank`` of a whole sequence along ``dim``, a copy.  [.., s, ..] -> [.., s/size, ..]"""
    if size == 1:
        return t
    dim %= t.dim()
    # [.., s, ..] -> [.., 2*size, s/(2*size), ..]
    chunks = t.unflatten(dim, (2 * size, chunk_length(t.shape[dim], size)))
    return torch.cat([chunks.select(dim, number) for number in chunks_of_rank(rank, size)], dim)


def get_batch_on_this_cp_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """This context-parallel rank's part of a batch: chunks r and 2*CP-1-r of 2*CP chunks of the sequence.

    Args:
        batch: tensors [b, s, ...], split along s; ``attention_mask`` [b, 1, s, s] is split along its queries
            (dimension 2) and keeps all keys; None stays None.

    Returns:
        A new dict; the same one at size 1.

    Raises:
        ConfigError: a sequence does not divide into 2*CP chunks.
    """
    rank, size = own_place()
    if size == 1:
        return batch
    return {
        name: None if t is None else take_chunks(t, 2 if name == "attention_mask" else 1, rank, size)
        for name, t in batch.items()
    }


def to_sequence_order(parts: Tensor) -> Tensor:
    """Parts of all ranks to the whole sequence.  [size, s/size, ..] -> [s, ..]

    Consecutive ranks that are only some of a larger context-parallel group give two runs of positions: the
    zigzag part of one rank of a group that many times smaller.
    """
    # First halves ascend with the rank, second halves descend.
    first, second = parts.chunk(2, dim=1)
    return torch.cat((first.flatten(0, 1), second.flip(0).flatten(0, 1)))


def to_rank_order(whole: Tensor, size: int) -> Tensor:
    """The inverse of :func:`to_sequence_order`.  [s, ..] -> [size, s/size, ..]"""
    first, second = whole.unflatten(0, (2, size, -1))
    return torch.cat((first, second.flip(0)), dim=1)


def shift_left(part: Tensor) -> Tensor:
    """This rank's part of the sequence moved by one position; 0 follows the last.  [.., s/size] -> the same

    The ranks exchange the first elements of their chunks.
    """
    group = parallel_state.get_context_parallel_group()
    rank, size = own_place()
    chunks = part.chunk(2, dim=-1)
    # [2, ..] of this rank, [2 * size, ..] of all chunks in the order of the sequence
    starts = torch.stack([chunk[..., 0] for chunk in chunks])
    gathered = starts.new_empty(size, *starts.shape)
    collectives.all_gather(gathered.flatten(0, 1), starts, group)
    ordered = to_sequence_order(gathered)
    following = torch.cat((ordered[1:], torch.zeros_like(ordered[:1])))
    return torch.cat(
        [
            torch.cat((chunk[..., 1:], following[number].unsqueeze(-1)), dim=-1)
            for chunk, number in zip(chunks, chunks_of_rank(rank, size), strict=True)
        ],
        dim=-1,
    )
