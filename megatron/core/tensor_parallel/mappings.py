"""Moving activations between the whole and the slices held by tensor-parallel ranks.

With one rank the whole is the slice, and every function returns its input.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.errors import NotBuiltYetError


def _alone(input_: Tensor, operation: str) -> Tensor:
    """``input_``, provided this rank has no tensor-parallel partners."""
    if parallel_state.model_parallel_is_initialized():
        size = parallel_state.get_tensor_model_parallel_world_size()
        if size > 1:
            raise NotBuiltYetError(operation, f"--tensor-model-parallel-size {size}", "Use 1.")
    return input_


def copy_to_tensor_model_parallel_region(input_: Tensor) -> Tensor:
    """Forward: identity; backward: sum over the ranks."""
    return _alone(input_, "summing input gradients over tensor-parallel ranks")


def reduce_from_tensor_model_parallel_region(input_: Tensor) -> Tensor:
    """Forward: sum over the ranks; backward: identity."""
    return _alone(input_, "summing partial outputs over tensor-parallel ranks")


def scatter_to_tensor_model_parallel_region(input_: Tensor) -> Tensor:
    """Forward: own slice of the last dimension; backward: gather."""
    return _alone(input_, "splitting activations over tensor-parallel ranks")


def gather_from_tensor_model_parallel_region(input_: Tensor) -> Tensor:
    """Forward: gather the last dimension; backward: own slice."""
    return _alone(input_, "gathering activations from tensor-parallel ranks")


def scatter_to_sequence_parallel_region(input_: Tensor) -> Tensor:
    """Forward: own slice of the first dimension; backward: gather."""
    return _alone(input_, "splitting sequences over tensor-parallel ranks")


def gather_from_sequence_parallel_region(
    input_: Tensor,
    tensor_parallel_output_grad: bool = True,
    group: dist.ProcessGroup | None = None,
    output_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """Forward: gather the first dimension; backward: reduce-scatter, or own slice."""
    return _alone(input_, "gathering sequences from tensor-parallel ranks")


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor,
    group: dist.ProcessGroup | None = None,
    input_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """Forward: reduce-scatter the first dimension; backward: gather."""
    return _alone(input_, "reducing sequences over tensor-parallel ranks")


def all_gather_last_dim_from_tensor_parallel_region(input_: Tensor) -> Tensor:
    """Forward: gather the last dimension; backward: reduce-scatter."""
    return _alone(input_, "gathering activations from tensor-parallel ranks")


def reduce_scatter_last_dim_to_tensor_parallel_region(input_: Tensor) -> Tensor:
    """Forward: reduce-scatter the last dimension; backward: gather."""
    return _alone(input_, "reducing activations over tensor-parallel ranks")


def all_to_all(
    group: Any,
    input_: Tensor,
    output_split_sizes_: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
) -> Tensor:
    """Exchanges slices of the first dimension within ``group``."""
    if group is not None and dist.get_world_size(group) > 1:
        raise NotBuiltYetError("exchanging slices between ranks", remedy="Use a group of one rank.")
    return input_


def all_to_all_sp2hp(input_: Tensor) -> Tensor:
    """[tokens/TP, h] -> [tokens, h/TP]."""
    return _alone(input_, "exchanging tokens for channels between tensor-parallel ranks")


def all_to_all_hp2sp(input_: Tensor) -> Tensor:
    """[tokens, h/TP] -> [tokens/TP, h]."""
    return _alone(input_, "exchanging channels for tokens between tensor-parallel ranks")
