"""Which part of a sequence a rank holds: chunks r and 2*size-1-r of 2*size."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
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
            f"--context-parallel-size {size}: use a multiple of {2 * size} such as --seq-length {fitting}"
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
