"""Splitting tensors and vocabularies evenly."""

import torch
from torch import Tensor

from megatron.core import collectives, parallel_state
from megatron.core.utils import divide


def split_tensor_along_last_dim(
    tensor: Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> tuple[Tensor, ...]:
    """Equal slices of the last dimension: views, or copies if ``contiguous_split_chunks``."""
    parts = torch.split(tensor, divide(tensor.shape[-1], num_partitions), dim=-1)
    return tuple(part.contiguous() for part in parts) if contiguous_split_chunks else parts


def split_tensor_into_1d_equal_chunks(tensor: Tensor, new_buffer: bool = False) -> Tensor:
    """This tensor-parallel rank's piece of the flattened tensor: a view, or a copy if ``new_buffer``."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    piece = divide(tensor.numel(), size)
    chunk = tensor.view(-1)[rank * piece : (rank + 1) * piece]
    return chunk.clone() if new_buffer else chunk


def gather_split_1d_tensor(tensor: Tensor) -> Tensor:
    """All tensor-parallel ranks' pieces, joined.  Inverse of :func:`split_tensor_into_1d_equal_chunks`."""
    group = parallel_state.get_tensor_model_parallel_group()
    gathered = tensor.new_empty(collectives.group_size(group) * tensor.numel())
    collectives.all_gather(gathered, tensor, group)
    return gathered


class VocabUtility:
    """Which token ids belong to which rank when a vocabulary is cut into equal ranges."""

    @staticmethod
    def vocab_range_from_per_partition_vocab_size(
        per_partition_vocab_size: int, rank: int, world_size: int
    ) -> tuple[int, int]:
        """(first, last + 1) id of a rank that holds ``per_partition_vocab_size`` ids."""
        first = rank * per_partition_vocab_size
        return first, first + per_partition_vocab_size

    @staticmethod
    def vocab_range_from_global_vocab_size(
        global_vocab_size: int, rank: int, world_size: int
    ) -> tuple[int, int]:
        """(first, last + 1) id of a rank when ``world_size`` ranks share the vocabulary."""
        share = divide(global_vocab_size, world_size)
        return VocabUtility.vocab_range_from_per_partition_vocab_size(share, rank, world_size)
