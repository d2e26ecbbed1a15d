"""Process groups of this run: built once by ``initialize_model_parallel``, read by everybody else.

Layout rules: ``megatron.core.rank_grid``. Groups with the same members share one process group, and a
rank takes part only in the creation of groups it belongs to, so that start-up cost follows the number of
groups of a rank and not the size of the world.

Functions that are put together from others stand here, so that they see replacements of those others in
this module. Groups can be read and swapped as attributes too (``parallel_state._EMBEDDING_GROUP``).
"""

import sys
from types import ModuleType
from typing import Any

import torch.distributed as dist

from megatron.core.parallel_state import state
from megatron.core.parallel_state.data_context import (
    get_amax_reduction_group,
    get_context_parallel_global_ranks,
    get_context_parallel_group,
    get_context_parallel_rank,
    get_context_parallel_world_size,
    get_data_parallel_group,
    get_data_parallel_group_gloo,
    get_data_parallel_rank,
    get_data_parallel_src_rank,
    get_data_parallel_world_size,
    get_hierarchical_context_parallel_groups,
    get_inter_partial_data_parallel_group,
    get_tensor_and_context_parallel_group,
    get_tensor_and_context_parallel_rank,
    get_tensor_and_context_parallel_world_size,
    get_tensor_and_data_parallel_group,
    set_data_parallel_rank,
)
from megatron.core.parallel_state.expert import (
    get_data_modulo_expert_parallel_group,
    get_expert_data_parallel_group,
    get_expert_data_parallel_group_gloo,
    get_expert_data_parallel_rank,
    get_expert_data_parallel_world_size,
    get_expert_model_parallel_group,
    get_expert_model_parallel_rank,
    get_expert_model_parallel_world_size,
    get_expert_tensor_and_model_parallel_group,
    get_expert_tensor_and_model_parallel_rank,
    get_expert_tensor_and_model_parallel_world_size,
    get_expert_tensor_model_pipeline_parallel_group,
    get_expert_tensor_parallel_group,
    get_expert_tensor_parallel_rank,
    get_expert_tensor_parallel_world_size,
    get_moe_layer_wise_logging_tracker,
    set_expert_model_parallel_rank,
    set_expert_model_parallel_world_size,
    set_expert_tensor_parallel_rank,
    set_expert_tensor_parallel_world_size,
)
from megatron.core.parallel_state.initialization import (
    GROUP_NAMES,
    _set_global_memory_buffer,
    create_hierarchical_parallel_groups,
    default_embedding_ranks,
    default_position_embedding_ranks,
    destroy_global_memory_buffer,
    destroy_model_parallel,
    get_global_memory_buffer,
    initialize_model_parallel,
    is_initialized,
    is_unitialized,
    model_parallel_is_initialized,
)
from megatron.core.parallel_state.tensor_pipeline import (
    get_embedding_group,
    get_model_parallel_group,
    get_model_parallel_src_rank,
    get_pipeline_model_parallel_decoder_start,
    get_pipeline_model_parallel_first_rank,
    get_pipeline_model_parallel_group,
    get_pipeline_model_parallel_last_rank,
    get_pipeline_model_parallel_rank,
    get_pipeline_model_parallel_split_rank,
    get_pipeline_model_parallel_world_size,
    get_position_embedding_group,
    get_tensor_model_parallel_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_src_rank,
    get_tensor_model_parallel_world_size,
    get_virtual_pipeline_model_parallel_rank,
    get_virtual_pipeline_model_parallel_world_size,
    is_rank_in_position_embedding_group,
    set_pipeline_model_parallel_rank,
    set_pipeline_model_parallel_split_rank,
    set_pipeline_model_parallel_world_size,
    set_tensor_model_parallel_rank,
    set_tensor_model_parallel_world_size,
    set_virtual_pipeline_model_parallel_rank,
    set_virtual_pipeline_model_parallel_world_size,
)
from megatron.core.process_groups import create_group, get_nccl_options
from megatron.core.rank_grid import RankGenerator, generate_masked_orthogonal_rank_groups

__all__ = [
    "RankGenerator",
    "create_group",
    "create_hierarchical_parallel_groups",
    "default_embedding_ranks",
    "default_position_embedding_ranks",
    "destroy_global_memory_buffer",
    "destroy_model_parallel",
    "generate_masked_orthogonal_rank_groups",
    "get_all_ranks",
    "get_amax_reduction_group",
    "get_context_parallel_global_ranks",
    "get_context_parallel_group",
    "get_context_parallel_rank",
    "get_context_parallel_world_size",
    "get_data_modulo_expert_parallel_group",
    "get_data_parallel_group",
    "get_data_parallel_group_gloo",
    "get_data_parallel_rank",
    "get_data_parallel_src_rank",
    "get_data_parallel_world_size",
    "get_embedding_group",
    "get_expert_data_parallel_group",
    "get_expert_data_parallel_group_gloo",
    "get_expert_data_parallel_rank",
    "get_expert_data_parallel_world_size",
    "get_expert_model_parallel_group",
    "get_expert_model_parallel_rank",
    "get_expert_model_parallel_world_size",
    "get_expert_tensor_and_model_parallel_group",
    "get_expert_tensor_and_model_parallel_rank",
    "get_expert_tensor_and_model_parallel_world_size",
    "get_expert_tensor_model_pipeline_parallel_group",
    "get_expert_tensor_parallel_group",
    "get_expert_tensor_parallel_rank",
    "get_expert_tensor_parallel_world_size",
    "get_global_memory_buffer",
    "get_hierarchical_context_parallel_groups",
    "get_inter_partial_data_parallel_group",
    "get_model_parallel_group",
    "get_model_parallel_src_rank",
    "get_moe_layer_wise_logging_tracker",
    "get_nccl_options",
    "get_pipeline_model_parallel_decoder_start",
    "get_pipeline_model_parallel_first_rank",
    "get_pipeline_model_parallel_group",
    "get_pipeline_model_parallel_last_rank",
    "get_pipeline_model_parallel_next_rank",
    "get_pipeline_model_parallel_prev_rank",
    "get_pipeline_model_parallel_rank",
    "get_pipeline_model_parallel_split_rank",
    "get_pipeline_model_parallel_world_size",
    "get_position_embedding_group",
    "get_tensor_and_context_parallel_group",
    "get_tensor_and_context_parallel_rank",
    "get_tensor_and_context_parallel_world_size",
    "get_tensor_and_data_parallel_group",
    "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_src_rank",
    "get_tensor_model_parallel_world_size",
    "get_virtual_pipeline_model_parallel_rank",
    "get_virtual_pipeline_model_parallel_world_size",
    "initialize_model_parallel",
    "is_initialized",
    "is_inside_decoder",
    "is_inside_encoder",
    "is_pipeline_first_stage",
    "is_pipeline_last_stage",
    "is_pipeline_stage_after_split",
    "is_pipeline_stage_at_split",
    "is_pipeline_stage_before_split",
    "is_rank_in_embedding_group",
    "is_rank_in_position_embedding_group",
    "is_unitialized",
    "model_parallel_is_initialized",
    "set_data_parallel_rank",
    "set_expert_model_parallel_rank",
    "set_expert_model_parallel_world_size",
    "set_expert_tensor_parallel_rank",
    "set_expert_tensor_parallel_world_size",
    "set_pipeline_model_parallel_rank",
    "set_pipeline_model_parallel_split_rank",
    "set_pipeline_model_parallel_world_size",
    "set_tensor_model_parallel_rank",
    "set_tensor_model_parallel_world_size",
    "set_virtual_pipeline_model_parallel_rank",
    "set_virtual_pipeline_model_parallel_world_size",
]


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


def get_pipeline_model_parallel_next_rank() -> int:
    """Global rank of the next stage; the first after the last."""
    ranks = state.ranks("_PIPELINE_MODEL_PARALLEL_GROUP")
    return ranks[(get_pipeline_model_parallel_rank() + 1) % get_pipeline_model_parallel_world_size()]


def get_pipeline_model_parallel_prev_rank() -> int:
    """Global rank of the previous stage; the last before the first."""
    ranks = state.ranks("_PIPELINE_MODEL_PARALLEL_GROUP")
    return ranks[(get_pipeline_model_parallel_rank() - 1) % get_pipeline_model_parallel_world_size()]


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


_RANK_LISTS = {
    "_PIPELINE_GLOBAL_RANKS": "_PIPELINE_MODEL_PARALLEL_GROUP",
    "_DATA_PARALLEL_GLOBAL_RANKS": "_DATA_PARALLEL_GROUP",
    "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": "_TENSOR_MODEL_PARALLEL_GROUP",
    "_MODEL_PARALLEL_GLOBAL_RANKS": "_MODEL_PARALLEL_GROUP",
    "_CONTEXT_PARALLEL_GLOBAL_RANKS": "_CONTEXT_PARALLEL_GROUP",
    "_EMBEDDING_GLOBAL_RANKS": "_EMBEDDING_GROUP",
    "_POSITION_EMBEDDING_GLOBAL_RANKS": "_POSITION_EMBEDDING_GROUP",
}


def _variable(table: str, name: str) -> property:
    """A module variable that stands for an entry of ``state``; None where there is none."""

    def write(module: ModuleType, value: Any) -> None:
        getattr(state.STATE, table)[name] = value

    return property(lambda module: getattr(state.STATE, table).get(name), write)


class _ModuleOfGroups(ModuleType):
    """Shows the groups and rank lists as module variables, which user code reads and tests swap."""


for _name in GROUP_NAMES:
    setattr(_ModuleOfGroups, _name, _variable("groups", _name))
for _name, _group in _RANK_LISTS.items():
    setattr(_ModuleOfGroups, _name, _variable("ranks", _group))
sys.modules[__name__].__class__ = _ModuleOfGroups
