"""Process groups of this run: built once by ``initialize_model_parallel``, read by everybody else.

Layout rules: ``megatron.core.rank_grid``. Groups with the same members share one process group, and a
rank takes part only in the creation of groups it belongs to, so that start-up cost follows the number of
groups of a rank and not the size of the world.

Each group, size and rank has a function here that reads the tables of ``state``; ``groups`` says which
groups there are, and ``initialization`` creates them. Groups can be read and swapped as attributes too
(``parallel_state._EMBEDDING_GROUP``).
"""

import sys
import warnings

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.errors import UsageError
from megatron.core.parallel_state import state
from megatron.core.parallel_state.groups import default_embedding_ranks, default_position_embedding_ranks
from megatron.core.parallel_state.initialization import (
    _set_global_memory_buffer,
    create_hierarchical_parallel_groups,
    destroy_global_memory_buffer,
    destroy_model_parallel,
    get_global_memory_buffer,
    initialize_model_parallel,
    is_initialized,
    is_unitialized,
    model_parallel_is_initialized,
)
from megatron.core.parallel_state.state import STATE
from megatron.core.process_groups import create_group, get_nccl_options
from megatron.core.rank_grid import RankGenerator, generate_masked_orthogonal_rank_groups

state.show_as_variables(sys.modules[__name__])

# ---- The tensor and pipeline axes


def get_model_parallel_group() -> ProcessGroup:
    """Tensor x pipeline group of this rank."""
    return state.group("_MODEL_PARALLEL_GROUP")


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


def get_pipeline_model_parallel_rank() -> int:
    """Pipeline stage of this rank."""
    return state.rank("_PIPELINE_MODEL_PARALLEL_GROUP", "pp_rank")


def get_virtual_pipeline_model_parallel_rank() -> int | None:
    """Virtual stage being built or run, None without virtual stages."""
    return STATE.by_hand.get("vpp_rank")


def set_virtual_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Select the virtual stage being built or run."""
    STATE.by_hand["vpp_rank"] = rank


def get_virtual_pipeline_model_parallel_world_size() -> int | None:
    """Virtual stages per rank, None without virtual stages."""
    return STATE.by_hand.get("vpp_size")


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


# ---- Stages: what their place means


def is_pipeline_first_stage(ignore_virtual: bool = False) -> bool:
    """True on the first stage (and its first virtual stage, unless ignored)."""
    if not ignore_virtual and get_virtual_pipeline_model_parallel_rank() not in (None, 0):
        return False
    return get_pipeline_model_parallel_rank() == 0


def is_pipeline_last_stage(ignore_virtual: bool = False) -> bool:
    """True on the last stage (and its last virtual stage, unless ignored)."""
    virtual_size = get_virtual_pipeline_model_parallel_world_size()
    is_inner_chunk = (
        not ignore_virtual
        and virtual_size is not None
        and get_virtual_pipeline_model_parallel_rank() != virtual_size - 1
    )
    return (
        not is_inner_chunk
        and get_pipeline_model_parallel_rank() == get_pipeline_model_parallel_world_size() - 1
    )


def is_rank_in_embedding_group(ignore_virtual: bool = False) -> bool:
    """True where word embeddings live; with virtual stages only in the chunk that has them."""
    if state.group("_EMBEDDING_GROUP", check_initialized=False) is None:
        return False
    if ignore_virtual:
        return True
    rank, ranks = dist.get_rank(), state.ranks("_EMBEDDING_GROUP")
    if rank == ranks[0] and is_pipeline_first_stage():
        return True
    return is_pipeline_last_stage() if rank == ranks[-1] else rank != ranks[0]


# ---- The data and context axes


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


def get_data_parallel_world_size(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> int:
    """Data-parallel size; 0 without torch.distributed."""
    return state.size_or_zero(_data_parallel(with_context_parallel, partial_data_parallel))


def get_data_parallel_rank(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
    """Data-parallel rank; 0 without torch.distributed."""
    return state.rank_or_zero(_data_parallel(with_context_parallel, partial_data_parallel), "dp_rank")


def get_context_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Context-parallel group of this rank."""
    return state.group("_CONTEXT_PARALLEL_GROUP", check_initialized)


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


# ---- The expert grid's axes


def get_expert_model_parallel_world_size() -> int:
    """Expert-parallel size; 0 without torch.distributed."""
    return state.size_or_zero("_EXPERT_MODEL_PARALLEL_GROUP", "ep_size")


def get_expert_model_parallel_rank() -> int:
    """Expert-parallel rank; 0 without torch.distributed."""
    return state.rank_or_zero("_EXPERT_MODEL_PARALLEL_GROUP", "ep_rank")


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


def get_expert_tensor_parallel_rank() -> int:
    """Tensor-parallel rank inside experts; before initialisation the rank set for the tensor axis."""
    return state.rank("_EXPERT_TENSOR_PARALLEL_GROUP", _tensor_by_hand("tp_rank"))


def get_expert_tensor_model_pipeline_parallel_group() -> ProcessGroup:
    """Expert tensor x expert x pipeline group, over which the norm of expert gradients is taken."""
    return state.group("_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP")


def get_expert_data_parallel_group() -> ProcessGroup:
    """Group over which gradients of expert weights are reduced."""
    return state.group("_EXPERT_DATA_PARALLEL_GROUP")


def get_expert_data_parallel_group_gloo() -> ProcessGroup:
    """Twin of the expert data-parallel group for tensors in host memory."""
    return state.group("_EXPERT_DATA_PARALLEL_GROUP_GLOO")


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def get_expert_data_parallel_rank() -> int:
    """Rank in the expert data-parallel group; 0 without torch.distributed."""
    return state.rank_or_zero("_EXPERT_DATA_PARALLEL_GROUP")


def get_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor x pipeline group."""
    return state.ranks("_MODEL_PARALLEL_GROUP")[0]


def set_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Override the number of pipeline stages."""
    STATE.by_hand["pp_size"] = world_size


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


def set_virtual_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Override the number of virtual stages per rank."""
    STATE.by_hand["vpp_size"] = world_size


def get_pipeline_model_parallel_first_rank() -> int:
    """Global rank of the first stage."""
    return state.ranks("_PIPELINE_MODEL_PARALLEL_GROUP")[0]


def get_pipeline_model_parallel_next_rank() -> int:
    """Global rank of the next stage; the first after the last."""
    ranks = state.ranks("_PIPELINE_MODEL_PARALLEL_GROUP")
    return ranks[(get_pipeline_model_parallel_rank() + 1) % get_pipeline_model_parallel_world_size()]


def get_pipeline_model_parallel_prev_rank() -> int:
    """Global rank of the previous stage; the last before the first."""
    ranks = state.ranks("_PIPELINE_MODEL_PARALLEL_GROUP")
    return ranks[(get_pipeline_model_parallel_rank() - 1) % get_pipeline_model_parallel_world_size()]


def _stage(rank: int | None) -> int:
    return get_pipeline_model_parallel_rank() if rank is None else rank


def is_pipeline_stage_before_split(rank: int | None = None) -> bool:
    """True where encoder layers run under the old split: also with one stage, or without a split."""
    split = get_pipeline_model_parallel_split_rank()
    return get_pipeline_model_parallel_world_size() == 1 or split is None or _stage(rank) < split


def is_pipeline_stage_after_split(rank: int | None = None) -> bool:
    """True where decoder layers run under the old split: also with one stage, or without a split."""
    split = get_pipeline_model_parallel_split_rank()
    return get_pipeline_model_parallel_world_size() == 1 or split is None or _stage(rank) >= split


def is_pipeline_stage_at_split() -> bool:
    """True on the last encoder stage under the old split: the next one runs decoder layers."""
    stage = get_pipeline_model_parallel_rank()
    return is_pipeline_stage_before_split(stage) and is_pipeline_stage_after_split(stage + 1)


def is_inside_encoder(rank: int | None = None) -> bool:
    """True on a stage with encoder layers: every stage unless the decoder starts at a stage of its own."""
    start = get_pipeline_model_parallel_decoder_start()
    return get_pipeline_model_parallel_world_size() == 1 or start is None or _stage(rank) < start


def is_inside_decoder(rank: int | None = None) -> bool:
    """True on a stage with decoder layers: every stage unless the decoder starts at a stage of its own."""
    start = get_pipeline_model_parallel_decoder_start()
    return get_pipeline_model_parallel_world_size() == 1 or start is None or _stage(rank) >= start


def get_inter_partial_data_parallel_group() -> ProcessGroup:
    """Ranks that hold equal shards in the different distributed optimizer instances."""
    return state.group("_INTER_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP")


def set_data_parallel_rank(rank: int | None) -> None:
    """Override the data-parallel rank."""
    STATE.by_hand["dp_rank"] = rank


def get_data_parallel_src_rank(with_context_parallel: bool = False) -> int:
    """Global rank of the first member of the data-parallel group."""
    return state.ranks(_data_parallel(with_context_parallel, partial_data_parallel=False))[0]


def get_context_parallel_global_ranks(check_initialized: bool = True) -> list[int] | None:
    """Global ranks of the context-parallel group."""
    state.group("_CONTEXT_PARALLEL_GROUP", check_initialized)
    return STATE.ranks.get("_CONTEXT_PARALLEL_GROUP")


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
    with the context axis folded in on request.
    """
    if not tp_only_amax_red:
        return state.group(_tensor_and_data(with_context_parallel))
    name = "_TENSOR_AND_CONTEXT_PARALLEL_GROUP" if with_context_parallel else "_TENSOR_MODEL_PARALLEL_GROUP"
    return state.group(name)


def get_expert_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Expert-parallel group of this rank."""
    return state.group("_EXPERT_MODEL_PARALLEL_GROUP", check_initialized)


def set_expert_model_parallel_world_size(world_size: int | None) -> None:
    """Override the expert-parallel size."""
    STATE.by_hand["ep_size"] = world_size


def set_expert_model_parallel_rank(rank: int | None) -> None:
    """Override the expert-parallel rank."""
    STATE.by_hand["ep_rank"] = rank


def set_expert_tensor_parallel_world_size(world_size: int | None) -> None:
    """Override the tensor-parallel size inside experts."""
    STATE.by_hand["expert_tp_size"] = world_size


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


def get_data_modulo_expert_parallel_group() -> ProcessGroup:
    """Old name of ``get_expert_data_parallel_group``."""
    warnings.warn(
        "get_data_modulo_expert_parallel_group() is now get_expert_data_parallel_group()",
        DeprecationWarning,
        stacklevel=2,
    )
    return get_expert_data_parallel_group()


def get_expert_data_parallel_world_size() -> int:
    """Size of the expert data-parallel group; 0 without torch.distributed."""
    return state.size_or_zero("_EXPERT_DATA_PARALLEL_GROUP")


def get_moe_layer_wise_logging_tracker() -> dict:
    """Mutable table of auxiliary losses by name."""
    return STATE.moe_log


def get_all_ranks() -> str:
    """Tensor, data, context, pipeline and expert ranks of this process, joined by underscores."""
    ranks = (
        get_tensor_model_parallel_rank(),
        get_data_parallel_rank(),
        get_context_parallel_rank(),
        get_pipeline_model_parallel_rank(),
        get_expert_model_parallel_rank(),
    )
    return "_".join(map(str, ranks))
