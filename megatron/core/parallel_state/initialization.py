"""Creates the groups of this rank, as ``groups`` plans them, and forgets them."""

import logging
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core import accelerator
from megatron.core.errors import NotBuiltYetError, UsageError
from megatron.core.parallel_state.groups import (
    GLOO_TWINS,
    PlannedGroup,
    default_embedding_ranks,
    default_position_embedding_ranks,
    plan_groups,
    ranks_of,
)
from megatron.core.parallel_state.state import STATE, GlobalMemoryBuffer
from megatron.core.process_groups import GroupFactory, device_backend, load_nccl_settings
from megatron.core.rank_grid import levels_of, make_grids

logger = logging.getLogger(__name__)

_PIPELINE_BACKENDS = (None, "nccl", "hccl", "gloo")


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
    communicator_buffers_mb: dict[str, int] | None = None,
) -> None:
    """Create every group this rank belongs to.

    ``torch.distributed`` must be initialized. Sizes are ranks per axis; the data-parallel size is what
    is left of the world.

    Args:
        virtual_pipeline_model_parallel_size: virtual stages per pipeline rank.
        pipeline_model_parallel_split_rank: old way to say at which stage a decoder starts.
        pipeline_model_parallel_comm_backend: nccl, hccl and gloo mean the world's own backend.
        use_sharp: has no effect: switches that reduce are used where NCCL finds them.
        hierarchical_context_parallel_sizes: sizes of nested context groups, neighbouring ranks first.
        num_distributed_optimizer_instances: copies of the sharded optimizer; divides the ranks of the
            data x context group.
        expert_tensor_parallel_size: defaults to the tensor-parallel size.
        nccl_communicator_config_path: YAML file with NCCL settings by group; no effect on other backends.
        order: axes of the rank grid, the fastest first.
        get_embedding_ranks, get_position_embedding_ranks: which ranks of a pipeline hold the embeddings.
        create_gloo_process_groups: also create twins of the data-parallel groups for host memory.
        communicator_buffers_mb: sizes of communication buffers by label of the group (``GROUP_AXES``), where
            the device's package sizes them; see ``process_groups.communicator_options``.

    Raises:
        UsageError: sizes that do not fit the world or each other, or a second call without
            ``destroy_model_parallel()``.
        NotBuiltYetError: an encoder on ranks of its own.
    """
    _check_request(
        pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_comm_backend,
        bool(encoder_pipeline_model_parallel_size or encoder_tensor_model_parallel_size),
    )
    grids = make_grids(
        dist.get_world_size(),
        tensor_model_parallel_size,
        pipeline_model_parallel_size,
        context_parallel_size,
        expert_model_parallel_size,
        expert_tensor_parallel_size or tensor_model_parallel_size,
        order,
    )
    split = pipeline_model_parallel_split_rank
    planned = plan_groups(
        grids,
        dist.get_rank(),
        num_distributed_optimizer_instances,
        get_embedding_ranks or (lambda ranks: default_embedding_ranks(ranks, split)),
        get_position_embedding_ranks or (lambda ranks: default_position_embedding_ranks(ranks, split)),
    )
    timeout = timedelta(minutes=distributed_timeout_minutes)
    settings = _nccl_settings(nccl_communicator_config_path)
    factory = GroupFactory(timeout, nccl_settings=settings, buffers_mb=communicator_buffers_mb)
    _create_groups(factory, planned, hierarchical_context_parallel_sizes)
    _log_communicators(factory, communicator_buffers_mb or {})
    if create_gloo_process_groups:
        _create_gloo_twins(timeout)
    STATE.by_hand["split_rank"] = split
    if virtual_pipeline_model_parallel_size is not None:
        STATE.by_hand.update(vpp_size=virtual_pipeline_model_parallel_size, vpp_rank=0)
    STATE.memory_buffer = GlobalMemoryBuffer()


def _check_request(
    stages: int, virtual_stages: int | None, pipeline_backend: str | None, has_encoder: bool
) -> None:
    """What cannot work whatever the world."""
    if not dist.is_initialized():
        raise UsageError("call torch.distributed.init_process_group() before initialize_model_parallel()")
    if is_initialized():
        raise UsageError("model parallel groups exist already: call destroy_model_parallel() first")
    if has_encoder:
        raise NotBuiltYetError("an encoder on ranks of its own")
    if pipeline_backend not in _PIPELINE_BACKENDS:
        raise UsageError(
            f"pipeline_model_parallel_comm_backend {pipeline_backend!r}: use one of "
            f"{', '.join(map(str, _PIPELINE_BACKENDS))}"
        )
    if virtual_stages is not None and stages < 2:
        raise UsageError(
            f"virtual_pipeline_model_parallel_size {virtual_stages} with one pipeline "
            "stage: leave it unset, or use 2 or more stages"
        )


def _nccl_settings(path: str | None) -> dict | None:
    if path is None:
        return None
    if device_backend() != "nccl":
        if dist.get_rank() == 0:
            logger.warning(
                "%s holds NCCL settings: the backend is %s, so they have no effect", path, device_backend()
            )
        return None
    return load_nccl_settings(path)


def _create_groups(factory: GroupFactory, planned: list[PlannedGroup], levels: list[int] | None) -> None:
    """Create all groups, each as suits everything that shares it."""
    for group in planned:
        factory.expect(group.ranks, group.label, group.in_layers)
    context = ranks_of(planned, "_CONTEXT_PARALLEL_GROUP")
    nested = levels_of(context, levels, dist.get_rank()) if levels else []
    for ranks in nested:
        factory.expect(ranks, "hcp", in_layers=True)
    for group in planned:
        STATE.groups[group.name] = factory.make(group.ranks, group.label, group.in_layers)
        STATE.ranks[group.name] = group.ranks
    STATE.hierarchical = [factory.make(ranks, "hcp", in_layers=True) for ranks in nested] or None


def _create_gloo_twins(timeout: timedelta) -> None:
    """Create the groups for tensors in host memory, beside those with the same ranks."""
    factory = GroupFactory(timeout, backend="gloo")
    for name in GLOO_TWINS:
        ranks = STATE.ranks[name]
        STATE.groups[f"{name}_GLOO"] = factory.make(ranks)
        STATE.ranks[f"{name}_GLOO"] = ranks


def _log_communicators(factory: GroupFactory, buffers_mb: dict[str, int]) -> None:
    """What the groups of rank 0 take of the device's memory, where the device's package can tell."""
    describe = accelerator.companion("describe_communicators")
    if describe is not None and dist.get_rank() == 0:
        world = (("world",), dist.get_world_size())
        logger.info(describe([world, *factory.labelled], buffers_mb))


def is_initialized() -> bool:
    """True when the data-parallel group exists."""
    return STATE.groups.get("_DATA_PARALLEL_GROUP") is not None


def model_parallel_is_initialized() -> bool:
    """True when the tensor, pipeline and data-parallel groups exist."""
    needed = ("_TENSOR_MODEL_PARALLEL_GROUP", "_PIPELINE_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")
    return all(STATE.groups.get(name) is not None for name in needed)


def destroy_model_parallel() -> None:
    """Forget every group and every value set by hand, so that initialisation can run again."""
    STATE.clear()


def get_global_memory_buffer() -> GlobalMemoryBuffer:
    """Scratch buffers shared by the layers of this process."""
    if STATE.memory_buffer is None:
        raise UsageError("global memory buffer is not initialized: call initialize_model_parallel()")
    return STATE.memory_buffer


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def create_hierarchical_parallel_groups(
    rank: int,
    ranks: list[int],
    group_size: int,
    hierarchical_group_sizes: list[int],
    pg_options: object = None,
) -> list[ProcessGroup]:
    """The nested groups of ``rank`` inside ``ranks``, neighbours first; every member of ``ranks`` calls it.

    Args:
        rank: global rank of the caller.
        ranks: global ranks of the group to divide, ``group_size`` of them.
        hierarchical_group_sizes: size of each level; their product is ``group_size``.
        pg_options: options of the backend.

    Raises:
        UsageError: the sizes do not multiply to ``group_size``.
    """
    if len(ranks) != group_size:
        raise UsageError(f"group_size {group_size} differs from the {len(ranks)} ranks given")
    factory = GroupFactory(None, options=pg_options)
    return [factory.make(members, "hcp") for members in levels_of(ranks, hierarchical_group_sizes, rank)]


def is_unitialized() -> bool:
    """Old opposite of ``is_initialized``, spelled as ever."""
    warnings.warn("is_unitialized() is now: not is_initialized()", DeprecationWarning, stacklevel=2)
    return not is_initialized()


def _set_global_memory_buffer() -> None:
    """Make the scratch buffers; there must be none yet."""
    if STATE.memory_buffer is not None:
        raise UsageError(
            "global memory buffer is already initialized: call destroy_global_memory_buffer() first"
        )
    STATE.memory_buffer = GlobalMemoryBuffer()


def destroy_global_memory_buffer() -> None:
    """Drop the scratch buffers."""
    STATE.memory_buffer = None
