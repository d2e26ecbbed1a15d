"""Process groups of this run: built once by ``initialize_model_parallel``, read by everybody else.

Layout rules: ``megatron.core.rank_grid``. Groups with the same members share one process group, and a
rank takes part only in the creation of groups it belongs to, so that start-up cost follows the number of
groups of a rank and not the size of the world.
"""

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.process_groups import GroupFactory
from megatron.core.rank_grid import (
    RankGenerator,  # noqa: F401
    generate_masked_orthogonal_rank_groups,  # noqa: F401
    make_grids,
)
from megatron.core.utils import GlobalMemoryBuffer

# Variable that holds a group -> (grid it is cut from, axes that vary inside it). The expert grid spans
# the same ranks as the dense one.
_GROUP_AXES = {
    "_TENSOR_MODEL_PARALLEL_GROUP": ("dense", "tp"),
    "_CONTEXT_PARALLEL_GROUP": ("dense", "cp"),
    "_PIPELINE_MODEL_PARALLEL_GROUP": ("dense", "pp"),
    "_MODEL_PARALLEL_GROUP": ("dense", "tp-pp"),
    "_DATA_PARALLEL_GROUP": ("dense", "dp"),
    "_DATA_PARALLEL_GROUP_WITH_CP": ("dense", "dp-cp"),
    "_TENSOR_AND_DATA_PARALLEL_GROUP": ("dense", "tp-dp"),
    "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": ("dense", "tp-dp-cp"),
    "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": ("dense", "tp-cp"),
    "_EXPERT_MODEL_PARALLEL_GROUP": ("expert", "ep"),
    "_EXPERT_TENSOR_PARALLEL_GROUP": ("expert", "tp"),
    "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": ("expert", "tp-ep"),
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": ("expert", "tp-ep-pp"),
    "_EXPERT_DATA_PARALLEL_GROUP": ("expert", "dp"),
}

# Groups, the global ranks in them, and values set by hand that win over the real ones (checkpoint tools
# run without process groups).
_GROUPS: dict[str, ProcessGroup] = {}
_RANKS: dict[str, list[int]] = {}
_SET_BY_HAND: dict[str, int | None] = {}
_MEMORY_BUFFER: list[GlobalMemoryBuffer] = []
_MOE_LAYER_WISE_LOGGING_TRACKER: dict = {}


def default_embedding_ranks(pp_ranks: list[int], split_rank: int | None = None) -> list[int]:
    """Stages of a pipeline that hold word embeddings: first, last and, if given, the split stage."""
    split = [] if split_rank is None else [pp_ranks[split_rank]]
    return list(dict.fromkeys([pp_ranks[0], *split, pp_ranks[-1]]))


def default_position_embedding_ranks(pp_ranks: list[int], split_rank: int | None = None) -> list[int]:
    """Stages of a pipeline that hold position embeddings: the first and, if given, the split stage."""
    split = [] if split_rank is None else [pp_ranks[split_rank]]
    return list(dict.fromkeys([pp_ranks[0], *split]))


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    virtual_pipeline_model_parallel_size: int | None = None,
    pipeline_model_parallel_split_rank: int | None = None,
    pipeline_model_parallel_comm_backend: str | None = None,
    use_sharp: bool = False,
    context_parallel_size: int = 1,
    hierarchical_context_parallel_sizes: list[int] | None = None,
    expert_model_parallel_size: int = 1,
    num_distributed_optimizer_instances: int = 1,
    expert_tensor_parallel_size: int | None = None,
    nccl_communicator_config_path: str | None = None,
    distributed_timeout_minutes: int = 30,
    order: str = "tp-cp-ep-dp-pp",
    encoder_tensor_model_parallel_size: int = 0,
    encoder_pipeline_model_parallel_size: int | None = 0,
    get_embedding_ranks: Callable[[list[int]], list[int]] | None = None,
    get_position_embedding_ranks: Callable[[list[int]], list[int]] | None = None,
    create_gloo_process_groups: bool = True,
) -> None:
    """Create every group this rank belongs to.

    ``torch.distributed`` must be initialized. Sizes are ranks per axis; the data-parallel size is what
    is left of the world. ``expert_tensor_parallel_size`` defaults to the tensor-parallel size.
    ``use_sharp`` and ``nccl_communicator_config_path`` tune NCCL and change nothing elsewhere.

    Raises:
        ConfigError: the world does not divide into the sizes, or a second call without
            ``destroy_model_parallel()``.
        NotBuiltYetError: a layout this version has no code for.
    """
    if not dist.is_initialized():
        raise ConfigError("call torch.distributed.init_process_group() before initialize_model_parallel()")
    if is_initialized():
        raise ConfigError("model parallel groups exist already: call destroy_model_parallel() first")
    not_built = {
        "hierarchical context parallelism": bool(hierarchical_context_parallel_sizes),
        "separate encoder ranks": bool(encoder_pipeline_model_parallel_size),
        "an encoder and decoder split": pipeline_model_parallel_split_rank is not None,
        "more than one distributed optimizer instance": num_distributed_optimizer_instances > 1,
        "a pipeline backend of its own": pipeline_model_parallel_comm_backend not in (None, "nccl"),
    }
    for feature, asked in not_built.items():
        if asked:
            raise NotBuiltYetError(feature)

    grids = make_grids(
        dist.get_world_size(),
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        context_parallel_size,
        expert_model_parallel_size,
        expert_tensor_parallel_size or tensor_model_parallel_size,
        order,
    )
    factory = GroupFactory(timedelta(minutes=distributed_timeout_minutes))
    for name, (grid, axes) in _GROUP_AXES.items():
        _add_group(name, factory, grids[grid].get_ranks(axes))
    pipelines = grids["dense"].get_ranks("pp")
    holders = {
        "_EMBEDDING_GROUP": get_embedding_ranks or default_embedding_ranks,
        "_POSITION_EMBEDDING_GROUP": get_position_embedding_ranks or default_position_embedding_ranks,
    }
    for name, choose in holders.items():
        _add_group(name, factory, [choose(ranks) for ranks in pipelines])
    if create_gloo_process_groups:
        gloo = GroupFactory(timedelta(minutes=distributed_timeout_minutes), backend="gloo")
        for name in ("_DATA_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP_WITH_CP", "_EXPERT_DATA_PARALLEL_GROUP"):
            _add_group(f"{name}_GLOO", gloo, [_RANKS[name]])
    if virtual_pipeline_model_parallel_size is not None:
        set_virtual_pipeline_model_parallel_world_size(virtual_pipeline_model_parallel_size)
        set_virtual_pipeline_model_parallel_rank(0)
    _MEMORY_BUFFER[:] = [GlobalMemoryBuffer()]


def _add_group(name: str, factory: GroupFactory, groups: list[list[int]]) -> None:
    """Keep the group that holds this rank under ``name``; nothing if there is none."""
    rank = dist.get_rank()
    for ranks in groups:
        if rank in ranks:
            _GROUPS[name], _RANKS[name] = factory.make(ranks), ranks


# ---- state ---------------------------------------------------------------------------------------------


def is_initialized() -> bool:
    """True when the data-parallel group exists."""
    return "_DATA_PARALLEL_GROUP" in _GROUPS


def model_parallel_is_initialized() -> bool:
    """True when the tensor, pipeline and data-parallel groups exist."""
    needed = ("_TENSOR_MODEL_PARALLEL_GROUP", "_PIPELINE_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")
    return all(name in _GROUPS for name in needed)


def destroy_model_parallel() -> None:
    """Forget every group and every value set by hand, so that initialisation can run again."""
    for table in (_GROUPS, _RANKS, _SET_BY_HAND, _MOE_LAYER_WISE_LOGGING_TRACKER):
        table.clear()
    _MEMORY_BUFFER.clear()


def get_global_memory_buffer() -> GlobalMemoryBuffer:
    """Scratch buffers shared by the layers of this process."""
    if not _MEMORY_BUFFER:
        raise AssertionError("global memory buffer is not initialized: call initialize_model_parallel()")
    return _MEMORY_BUFFER[0]


def destroy_global_memory_buffer() -> None:
    """Drop the scratch buffers."""
    _MEMORY_BUFFER.clear()


def get_moe_layer_wise_logging_tracker() -> dict:
    """Mutable table of auxiliary losses by name."""
    return _MOE_LAYER_WISE_LOGGING_TRACKER


def _group(name: str, check_initialized: bool = True) -> ProcessGroup | None:
    if check_initialized and name not in _GROUPS:
        label = name.strip("_").lower().replace("_", " ")
        raise AssertionError(f"{label} is not initialized: call initialize_model_parallel() first")
    return _GROUPS.get(name)


def _size(name: str, by_hand: str | None = None) -> int:
    if _SET_BY_HAND.get(by_hand) is not None:
        return _SET_BY_HAND[by_hand]
    return dist.get_world_size(_group(name))


def _rank(name: str, by_hand: str | None = None) -> int:
    if _SET_BY_HAND.get(by_hand) is not None:
        return _SET_BY_HAND[by_hand]
    return dist.get_rank(_group(name))


def _with_cp(name: str, with_context_parallel: bool) -> str:
    return f"{name}_WITH_CP" if with_context_parallel else name


# ---- tensor and pipeline axes --------------------------------------------------------------------------


def get_model_parallel_group() -> ProcessGroup:
    """Tensor x pipeline group of this rank."""
    return _group("_MODEL_PARALLEL_GROUP")


def get_tensor_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Tensor-parallel group of this rank."""
    return _group("_TENSOR_MODEL_PARALLEL_GROUP", check_initialized)


def get_tensor_model_parallel_world_size() -> int:
    """Tensor-parallel size."""
    return _size("_TENSOR_MODEL_PARALLEL_GROUP", "tp_size")


def set_tensor_model_parallel_world_size(world_size: int | None) -> None:
    """Override the tensor-parallel size."""
    _SET_BY_HAND["tp_size"] = world_size


def get_tensor_model_parallel_rank() -> int:
    """Rank in the tensor-parallel group."""
    return _rank("_TENSOR_MODEL_PARALLEL_GROUP", "tp_rank")


def set_tensor_model_parallel_rank(rank: int | None) -> None:
    """Override the tensor-parallel rank."""
    _SET_BY_HAND["tp_rank"] = rank


def get_tensor_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor-parallel group."""
    _group("_TENSOR_MODEL_PARALLEL_GROUP")
    return _RANKS["_TENSOR_MODEL_PARALLEL_GROUP"][0]


def get_model_parallel_src_rank() -> int:
    """Global rank of the first member of the tensor x pipeline group."""
    _group("_MODEL_PARALLEL_GROUP")
    return _RANKS["_MODEL_PARALLEL_GROUP"][0]


def get_pipeline_model_parallel_group() -> ProcessGroup:
    """Pipeline group of this rank."""
    return _group("_PIPELINE_MODEL_PARALLEL_GROUP")


def get_pipeline_model_parallel_world_size() -> int:
    """Number of pipeline stages."""
    return _size("_PIPELINE_MODEL_PARALLEL_GROUP", "pp_size")


def set_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Override the number of pipeline stages."""
    _SET_BY_HAND["pp_size"] = world_size


def get_pipeline_model_parallel_rank() -> int:
    """Pipeline stage of this rank."""
    return _rank("_PIPELINE_MODEL_PARALLEL_GROUP", "pp_rank")


def set_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Override the pipeline stage."""
    _SET_BY_HAND["pp_rank"] = rank


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


def get_virtual_pipeline_model_parallel_rank() -> int | None:
    """Virtual stage being built or run, None without virtual stages."""
    return _SET_BY_HAND.get("vpp_rank")


def set_virtual_pipeline_model_parallel_rank(rank: int | None) -> None:
    """Select the virtual stage being built or run."""
    _SET_BY_HAND["vpp_rank"] = rank


def get_virtual_pipeline_model_parallel_world_size() -> int | None:
    """Virtual stages per rank, None without virtual stages."""
    return _SET_BY_HAND.get("vpp_size")


def set_virtual_pipeline_model_parallel_world_size(world_size: int | None) -> None:
    """Override the number of virtual stages per rank."""
    _SET_BY_HAND["vpp_size"] = world_size


def _pipeline_ranks() -> list[int]:
    _group("_PIPELINE_MODEL_PARALLEL_GROUP")
    return _RANKS["_PIPELINE_MODEL_PARALLEL_GROUP"]


def get_pipeline_model_parallel_first_rank() -> int:
    """Global rank of the first stage."""
    return _pipeline_ranks()[0]


def get_pipeline_model_parallel_last_rank() -> int:
    """Global rank of the last stage."""
    return _pipeline_ranks()[-1]


def get_pipeline_model_parallel_next_rank() -> int:
    """Global rank of the next stage; the first after the last."""
    ranks = _pipeline_ranks()
    return ranks[(get_pipeline_model_parallel_rank() + 1) % len(ranks)]


def get_pipeline_model_parallel_prev_rank() -> int:
    """Global rank of the previous stage; the last before the first."""
    return _pipeline_ranks()[get_pipeline_model_parallel_rank() - 1]


def get_embedding_group() -> ProcessGroup:
    """Group of the stages that hold a copy of the word embeddings."""
    return _group("_EMBEDDING_GROUP")


def get_position_embedding_group() -> ProcessGroup:
    """Group of the stages that hold a copy of the position embeddings."""
    return _group("_POSITION_EMBEDDING_GROUP")


def is_rank_in_embedding_group(ignore_virtual: bool = False) -> bool:
    """True where word embeddings live; with virtual stages only in the chunk that has them."""
    if "_EMBEDDING_GROUP" not in _GROUPS:
        return False
    if ignore_virtual:
        return True
    rank, ranks = dist.get_rank(), _RANKS["_EMBEDDING_GROUP"]
    if rank == ranks[0] and is_pipeline_first_stage():
        return True
    return is_pipeline_last_stage() if rank == ranks[-1] else rank != ranks[0]


def is_rank_in_position_embedding_group() -> bool:
    """True where position embeddings live."""
    return "_POSITION_EMBEDDING_GROUP" in _GROUPS


# ---- data and context axes -----------------------------------------------------------------------------


def get_data_parallel_group(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> ProcessGroup:
    """Data-parallel group, with the context axis folded in on request.

    ``partial_data_parallel`` asks for the shard group of one distributed optimizer instance; with a
    single instance that is the whole group.
    """
    return _group(_with_cp("_DATA_PARALLEL_GROUP", with_context_parallel))


def get_data_parallel_group_gloo(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> ProcessGroup:
    """Twin of the data-parallel group for tensors in host memory."""
    return _group(f"{_with_cp('_DATA_PARALLEL_GROUP', with_context_parallel)}_GLOO")


def get_data_parallel_world_size(
    with_context_parallel: bool = False, partial_data_parallel: bool = False
) -> int:
    """Data-parallel size; 0 without torch.distributed."""
    if not dist.is_initialized():
        return 0
    return _size(_with_cp("_DATA_PARALLEL_GROUP", with_context_parallel))


def get_data_parallel_rank(with_context_parallel: bool = False, partial_data_parallel: bool = False) -> int:
    """Data-parallel rank; 0 without torch.distributed."""
    if _SET_BY_HAND.get("dp_rank") is None and not dist.is_initialized():
        return 0
    return _rank(_with_cp("_DATA_PARALLEL_GROUP", with_context_parallel), "dp_rank")


def set_data_parallel_rank(rank: int | None) -> None:
    """Override the data-parallel rank."""
    _SET_BY_HAND["dp_rank"] = rank


def get_data_parallel_src_rank(with_context_parallel: bool = False) -> int:
    """Global rank of the first member of the data-parallel group."""
    name = _with_cp("_DATA_PARALLEL_GROUP", with_context_parallel)
    _group(name)
    return _RANKS[name][0]


def get_context_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Context-parallel group of this rank."""
    return _group("_CONTEXT_PARALLEL_GROUP", check_initialized)


def get_context_parallel_global_ranks(check_initialized: bool = True) -> list[int] | None:
    """Global ranks of the context-parallel group."""
    _group("_CONTEXT_PARALLEL_GROUP", check_initialized)
    return _RANKS.get("_CONTEXT_PARALLEL_GROUP")


def get_context_parallel_world_size() -> int:
    """Context-parallel size; 0 without torch.distributed."""
    return _size("_CONTEXT_PARALLEL_GROUP") if dist.is_initialized() else 0


def get_context_parallel_rank() -> int:
    """Context-parallel rank; 0 without torch.distributed."""
    return _rank("_CONTEXT_PARALLEL_GROUP") if dist.is_initialized() else 0


def get_tensor_and_data_parallel_group(with_context_parallel: bool = False) -> ProcessGroup:
    """Tensor x data group, with the context axis folded in on request."""
    return _group(_with_cp("_TENSOR_AND_DATA_PARALLEL_GROUP", with_context_parallel))


def get_tensor_and_context_parallel_group() -> ProcessGroup:
    """Tensor x context group."""
    return _group("_TENSOR_AND_CONTEXT_PARALLEL_GROUP")


def get_tensor_and_context_parallel_world_size() -> int:
    """Size of the tensor x context group; 0 without torch.distributed."""
    return _size("_TENSOR_AND_CONTEXT_PARALLEL_GROUP") if dist.is_initialized() else 0


def get_tensor_and_context_parallel_rank() -> int:
    """Rank in the tensor x context group; 0 without torch.distributed."""
    return _rank("_TENSOR_AND_CONTEXT_PARALLEL_GROUP") if dist.is_initialized() else 0


# ---- expert axes ---------------------------------------------------------------------------------------


def get_expert_model_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Expert-parallel group of this rank."""
    return _group("_EXPERT_MODEL_PARALLEL_GROUP", check_initialized)


def get_expert_model_parallel_world_size() -> int:
    """Expert-parallel size; 0 without torch.distributed."""
    if _SET_BY_HAND.get("ep_size") is None and not dist.is_initialized():
        return 0
    return _size("_EXPERT_MODEL_PARALLEL_GROUP", "ep_size")


def set_expert_model_parallel_world_size(world_size: int | None) -> None:
    """Override the expert-parallel size."""
    _SET_BY_HAND["ep_size"] = world_size


def get_expert_model_parallel_rank() -> int:
    """Expert-parallel rank; 0 without torch.distributed."""
    if _SET_BY_HAND.get("ep_rank") is None and not dist.is_initialized():
        return 0
    return _rank("_EXPERT_MODEL_PARALLEL_GROUP", "ep_rank")


def set_expert_model_parallel_rank(rank: int | None) -> None:
    """Override the expert-parallel rank."""
    _SET_BY_HAND["ep_rank"] = rank


def get_expert_tensor_parallel_group(check_initialized: bool = True) -> ProcessGroup | None:
    """Tensor-parallel group inside experts."""
    return _group("_EXPERT_TENSOR_PARALLEL_GROUP", check_initialized)


def get_expert_tensor_parallel_world_size() -> int:
    """Tensor-parallel size inside experts."""
    return _size("_EXPERT_TENSOR_PARALLEL_GROUP", "expert_tp_size")


def set_expert_tensor_parallel_world_size(world_size: int | None) -> None:
    """Override the tensor-parallel size inside experts."""
    _SET_BY_HAND["expert_tp_size"] = world_size


def get_expert_tensor_parallel_rank() -> int:
    """Tensor-parallel rank inside experts."""
    return _rank("_EXPERT_TENSOR_PARALLEL_GROUP", "expert_tp_rank")


def set_expert_tensor_parallel_rank(rank: int | None) -> None:
    """Override the tensor-parallel rank inside experts."""
    _SET_BY_HAND["expert_tp_rank"] = rank


def get_expert_data_parallel_group() -> ProcessGroup:
    """Group over which gradients of expert weights are reduced."""
    return _group("_EXPERT_DATA_PARALLEL_GROUP")


def get_expert_data_parallel_world_size() -> int:
    """Size of the expert data-parallel group; 0 without torch.distributed."""
    return _size("_EXPERT_DATA_PARALLEL_GROUP") if dist.is_initialized() else 0


def get_expert_data_parallel_rank() -> int:
    """Rank in the expert data-parallel group; 0 without torch.distributed."""
    return _rank("_EXPERT_DATA_PARALLEL_GROUP") if dist.is_initialized() else 0


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
