"""Attributes that say how a parameter is split over tensor-parallel ranks."""

from torch import Tensor

from megatron.core import parallel_state
from megatron.core.errors import UsageError

# name -> value of a parameter that is not split
_DEFAULTS = {"tensor_model_parallel": False, "partition_dim": -1, "partition_stride": 1}


def param_is_not_tensor_parallel_duplicate(param: Tensor) -> bool:
    """True for one copy of each element: a split parameter, or anything on tensor-parallel rank 0."""
    return (
        getattr(param, "tensor_model_parallel", False) or parallel_state.get_tensor_model_parallel_rank() == 0
    )


def set_tensor_model_parallel_attributes(tensor: Tensor, is_parallel: bool, dim: int, stride: int) -> None:
    """Marks a parameter as split along ``dim``, in ``stride`` interleaved parts; only once."""
    for name in _DEFAULTS:
        if hasattr(tensor, name):
            raise UsageError(f"parameter has {name} = {getattr(tensor, name)} already")
    tensor.tensor_model_parallel = is_parallel
    tensor.partition_dim = dim
    tensor.partition_stride = stride


def set_defaults_if_not_set_tensor_model_parallel_attributes(tensor: Tensor) -> None:
    """Marks a parameter as not split, where nothing is said."""
    for name, value in _DEFAULTS.items():
        if not hasattr(tensor, name):
            setattr(tensor, name, value)


def copy_tensor_model_parallel_attributes(destination_tensor: Tensor, source_tensor: Tensor) -> None:
    """Copies the attributes that ``source_tensor`` has."""
    for name in _DEFAULTS:
        if hasattr(source_tensor, name):
            setattr(destination_tensor, name, getattr(source_tensor, name))
