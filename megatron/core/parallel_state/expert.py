"""Getters of the expert grid's axes."""

import warnings

from torch.distributed import ProcessGroup

from megatron.core.parallel_state import state
from megatron.core.parallel_state.state import STATE


def get_expert_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Expert-parallel group of this rank."""
    return state.group("_EXPERT_MODEL_PARALLEL_GROUP", check_initialized)


def get_expert_model_parallel_world_size() -> int:
    """Expert-parallel size; 0 without torch.distributed."""
    return state.size_or_zero("_EXPERT_MODEL_PARALLEL_GROUP", "ep_size")


def set_expert_model_parallel_world_size(world_size: int | None) -> None:
    """Override the expert-parallel size."""
    STATE.by_hand["ep_size"] = world_size


def get_expert_model_parallel_rank() -> int:
    """Expert-parallel rank; 0 without torch.distributed."""
    return state.rank_or_zero("_EXPERT_MODEL_PARALLEL_GROUP", "ep_rank")


def set_expert_model_parallel_rank(rank: int | None) -> None:
    """Override the expert-parallel rank."""
    STATE.by_hand["ep_rank"] = rank


def get_expert_tensor_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Tensor-parallel group inside experts."""
    return state.group("_EXPERT_TENSOR_PARALLEL_GROUP", check_initialized)


def _tensor_by_hand(key: str) -> str:
    """Before initialisation, what was set for the dense tensor axis holds inside experts too."""
    has_own = STATE.by_hand.get(f"expert_{key}") is not None
    return f"expert_{key}" if has_own or "_EXPERT_TENSOR_PARALLEL_GROUP" in STATE.groups else key


def get_expert_tensor_parallel_world_size() -> int:
    """Tensor-parallel size inside experts; before initialisation the size set for the tensor axis."""
    return state.size("_EXPERT_TENSOR_PARALLEL_GROUP", _tensor_by_hand("tp_size"))


def set_expert_tensor_parallel_world_size(world_size: int | None) -> None:
    """Override the tensor-parallel size inside experts."""
    STATE.by_hand["expert_tp_size"] = world_size


def get_expert_tensor_parallel_rank() -> int:
    """Tensor-parallel rank inside experts; before initialisation the rank set for the tensor axis."""
    return state.rank("_EXPERT_TENSOR_PARALLEL_GROUP", _tensor_by_hand("tp_rank"))


def set_expert_tensor_parallel_rank(rank: int | None) -> None:
    """Override the tensor-parallel rank inside experts."""
    STATE.by_hand["expert_tp_rank"] = rank


def get_expert_tensor_and_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Expert tensor x expert group: all ranks that share the experts of one layer."""
    return state.group("_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP", check_initialized)


def get_expert_tensor_and_model_parallel_world_size() -> int:
    """Size of the expert tensor x expert group; 0 without torch.distributed."""
    return state.size_or_zero("_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP")


def get_expert_tensor_and_model_parallel_rank() -> int:
    """Rank in the expert tensor x expert group; 0 without torch.distributed."""
    return state.rank_or_zero("_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP")


def get_expert_tensor_model_pipeline_parallel_group() -> ProcessGroup:
    """Expert tensor x expert x pipeline group, over which the norm of expert gradients is taken."""
    return state.group("_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP")


def get_expert_data_parallel_group() -> ProcessGroup:
    """Group over which gradients of expert weights are reduced."""
    return state.group("_EXPERT_DATA_PARALLEL_GROUP")


def get_data_modulo_expert_parallel_group() -> ProcessGroup:
    """Old name of ``get_expert_data_parallel_group``."""
    warnings.warn(
        "get_data_modulo_expert_parallel_group() is now get_expert_data_parallel_group()",
        DeprecationWarning,
        stacklevel=2,
    )
    return get_expert_data_parallel_group()


def get_expert_data_parallel_group_gloo() -> ProcessGroup:
    """Twin of the expert data-parallel group for tensors in host memory."""
    return state.group("_EXPERT_DATA_PARALLEL_GROUP_GLOO")


def get_expert_data_parallel_world_size() -> int:
    """Size of the expert data-parallel group; 0 without torch.distributed."""
    return state.size_or_zero("_EXPERT_DATA_PARALLEL_GROUP")


def get_expert_data_parallel_rank() -> int:
    """Rank in the expert data-parallel group; 0 without torch.distributed."""
    return state.rank_or_zero("_EXPERT_DATA_PARALLEL_GROUP")


def get_moe_layer_wise_logging_tracker() -> dict:
    """Mutable table of auxiliary losses by name."""
    return STATE.moe_log
