"""Getters of the tensor and pipeline axes."""

from torch.distributed import ProcessGroup

from megatron.core.parallel_state import state
from megatron.core.parallel_state.state import STATE


def get_model_parallel_group() -> ProcessGroup:
    """Tensor x pipeline group of this rank."""
    return state.group("_MODEL_PARALLEL_GROUP")


def get_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor x pipeline group."""
    return state.ranks("_MODEL_PARALLEL_GROUP")[0]


def get_tensor_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Tensor-parallel group of this rank."""
    return state.group("_TENSOR_MODEL_PARALLEL_GROUP", check_initialized)


def get_tensor_model_parallel_world_size() -> int:
    """Tensor-parallel size."""
    return state.size("_TENSOR_MODEL_PARALLEL_GROUP", "tp_size")


def set_tensor_model_parallel_world_size(world_size: int | None) -> None:
    """Override the tensor-parallel size."""
    STATE.by_hand["tp_size"] = world_size


def get_tensor_model_parallel_rank() -> int:
    """Rank in the tensor-parallel group."""
    return state.rank("_TENSOR_MODEL_PARALLEL_GROUP", "tp_rank")


def set_tensor_model_parallel_rank(rank: int | None) -> None:
    """Override the tensor-parallel rank."""
    STATE.by_hand["tp_rank"] = rank


def get_tensor_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor-parallel group."""
    return state.ranks("_TENSOR_MODEL_PARALLEL_GROUP")[0]


def get_pipeline_model_parallel_group() -> ProcessGroup:
    """Pipeline group of this rank."""
    return state.group("_PIPELINE_MODEL_PARALLEL_GROUP")


def get_pipeline_model_parallel_world_size() -> int:
    """Number of pipeline stages."""
    return state.size("_PIPELINE_MODEL_PARALLEL_GROUP", "pp_size")


def set_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Override the number of pipeline stages."""
    STATE.by_hand["pp_size"] = world_size


def get_pipeline_model_parallel_rank() -> int:
    """Pipeline stage of this rank."""
    return state.rank("_PIPELINE_MODEL_PARALLEL_GROUP", "pp_rank")


def set_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Override the pipeline stage."""
    STATE.by_hand["pp_rank"] = rank


def get_pipeline_model_parallel_split_rank() -> int | None:
    """First decoder stage of the old encoder/decoder split, None without one."""
    return STATE.by_hand.get("split_rank")


def set_pipeline_model_parallel_split_rank(rank: int | None) -> None:
    """Override the first decoder stage of the old encoder/decoder split."""
    STATE.by_hand["split_rank"] = rank


def get_pipeline_model_parallel_decoder_start() -> int | None:
    """First stage with decoder layers where encoder and decoder have stages of their own, else None."""
    return STATE.by_hand.get("decoder_start")


def get_virtual_pipeline_model_parallel_rank() -> int | None:
    """Virtual stage being built or run, None without virtual stages."""
    return STATE.by_hand.get("vpp_rank")


def set_virtual_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Select the virtual stage being built or run."""
    STATE.by_hand["vpp_rank"] = rank


def get_virtual_pipeline_model_parallel_world_size() -> int | None:
    """Virtual stages per rank, None without virtual stages."""
    return STATE.by_hand.get("vpp_size")


def set_virtual_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Override the number of virtual stages per rank."""
    STATE.by_hand["vpp_size"] = world_size


def get_pipeline_model_parallel_first_rank() -> int:
    """Global rank of the first stage."""
    return state.ranks("_PIPELINE_MODEL_PARALLEL_GROUP")[0]


def get_pipeline_model_parallel_last_rank() -> int:
    """Global rank of the last stage."""
    return state.ranks("_PIPELINE_MODEL_PARALLEL_GROUP")[-1]


def get_embedding_group() -> ProcessGroup:
    """Group of the stages that hold a copy of the word embeddings."""
    return state.group("_EMBEDDING_GROUP")


def get_position_embedding_group() -> ProcessGroup:
    """Group of the stages that hold a copy of the position embeddings."""
    return state.group("_POSITION_EMBEDDING_GROUP")


def is_rank_in_position_embedding_group() -> bool:
    """True where position embeddings live."""
    return state.group("_POSITION_EMBEDDING_GROUP", check_initialized=False) is not None
