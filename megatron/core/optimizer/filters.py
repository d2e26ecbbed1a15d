"""Which parameters count in statistics over all model-parallel ranks."""

from torch import Tensor

from megatron.core import parallel_state


def counts_once(param: Tensor) -> bool:
    """True where ``param`` counts: of tied copies the first, of tensor-parallel replicas rank 0's."""
    return not getattr(param, "shared", False) and not _is_tensor_parallel_duplicate(param)


def _is_tensor_parallel_duplicate(param: Tensor) -> bool:
    if getattr(param, "tensor_model_parallel", False) or not parallel_state.model_parallel_is_initialized():
        return False
    return parallel_state.get_tensor_model_parallel_rank() != 0
