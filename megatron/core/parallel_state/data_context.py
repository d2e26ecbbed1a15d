"""Getters of the data and context axes."""

from torch.distributed import ProcessGroup

from megatron.core.errors import UsageError
from megatron.core.parallel_state import state
from megatron.core.parallel_state.state import STATE


def _data_parallel(with_context_parallel: bool, partial_data_parallel: bool) -> str:
    if not partial_data_parallel:
        return "_DATA_PARALLEL_GROUP_WITH_CP" if with_context_parallel else "_DATA_PARALLEL_GROUP"
    if not with_context_parallel:
        raise UsageError(
            "the shard group of an optimizer instance spans the context axis: pass with_context_parallel=True"
        )
    return "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"


def get_data_parallel_group(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> ProcessGroup:
    """Data-parallel group, with the context axis folded in on request.

    ``partial_data_parallel`` asks for the shard group of one distributed optimizer instance, and needs
    ``with_context_parallel``; with a single instance that is the whole group.
    """
    return state.group(_data_parallel(with_context_parallel, partial_data_parallel))


def get_data_parallel_group_gloo(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> ProcessGroup:
    """Twin of the data-parallel group for tensors in host memory."""
    return state.group(f"{_data_parallel(with_context_parallel, partial_data_parallel)}_GLOO")


def get_inter_partial_data_parallel_group() -> ProcessGroup:
    """Ranks that hold equal shards in the different distributed optimizer instances."""
    return state.group("_INTER_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP")


def get_data_parallel_world_size(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> int:
    """Data-parallel size; 0 without torch.distributed."""
    return state.size_or_zero(_data_parallel(with_context_parallel, partial_data_parallel))


def get_data_parallel_rank(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
    """Data-parallel rank; 0 without torch.distributed."""
    return state.rank_or_zero(_data_parallel(with_context_parallel, partial_data_parallel), "dp_rank")


def set_data_parallel_rank(rank: int | None) -> None:
    """Override the data-parallel rank."""
    STATE.by_hand["dp_rank"] = rank


def get_data_parallel_src_rank(with_context_parallel: bool = False) -> int:
    """Global rank of the first member of the data-parallel group."""
    return state.ranks(_data_parallel(with_context_parallel, partial_data_parallel=False))[0]


def get_context_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Context-parallel group of this rank."""
    return state.group("_CONTEXT_PARALLEL_GROUP", check_initialized)


def get_context_parallel_global_ranks(check_initialized: bool = True) -> list[int] | None:
    """Global ranks of the context-parallel group."""
    state.group("_CONTEXT_PARALLEL_GROUP", check_initialized)
    return STATE.ranks.get("_CONTEXT_PARALLEL_GROUP")


def get_hierarchical_context_parallel_groups(check_initialized: bool = True) -> list[ProcessGroup] | None:
    """Groups of this rank inside its context-parallel group, one per level, neighbours first."""
    if check_initialized and STATE.hierarchical is None:
        raise UsageError(
            "hierarchical context parallel groups are not initialized: pass "
            "hierarchical_context_parallel_sizes to initialize_model_parallel()"
        )
    return STATE.hierarchical


def get_context_parallel_world_size() -> int:
    """Context-parallel size; 0 without torch.distributed."""
    return state.size_or_zero("_CONTEXT_PARALLEL_GROUP")


def get_context_parallel_rank() -> int:
    """Context-parallel rank; 0 without torch.distributed."""
    return state.rank_or_zero("_CONTEXT_PARALLEL_GROUP")


def _tensor_and_data(with_context_parallel: bool) -> str:
    name = "_TENSOR_AND_DATA_PARALLEL_GROUP"
    return f"{name}_WITH_CP" if with_context_parallel else name


def get_tensor_and_data_parallel_group(with_context_parallel: bool = False) -> ProcessGroup:
    """Tensor x data group, with the context axis folded in on request."""
    return state.group(_tensor_and_data(with_context_parallel))


def get_tensor_and_context_parallel_group() -> ProcessGroup:
    """Tensor x context group."""
    return state.group("_TENSOR_AND_CONTEXT_PARALLEL_GROUP")


def get_tensor_and_context_parallel_world_size() -> int:
    """Size of the tensor x context group; 0 without torch.distributed."""
    return state.size_or_zero("_TENSOR_AND_CONTEXT_PARALLEL_GROUP")


def get_tensor_and_context_parallel_rank() -> int:
    """Rank in the tensor x context group; 0 without torch.distributed."""
    return state.rank_or_zero("_TENSOR_AND_CONTEXT_PARALLEL_GROUP")


def get_amax_reduction_group(
    with_context_parallel: bool = False, tp_only_amax_red: bool = False
) -> ProcessGroup:
    """Ranks that share fp8 statistics: tensor x data, or with ``tp_only_amax_red`` tensor alone; each
    with the context axis folded in on request."""
    if not tp_only_amax_red:
        return state.group(_tensor_and_data(with_context_parallel))
    name = "_TENSOR_AND_CONTEXT_PARALLEL_GROUP" if with_context_parallel else "_TENSOR_MODEL_PARALLEL_GROUP"
    return state.group(name)
