"""Creating the groups of this rank, and forgetting them."""

import logging
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core import accelerator
from megatron.core.errors import NotBuiltYetError, UsageError
from megatron.core.parallel_state.state import STATE, GlobalMemoryBuffer
from megatron.core.process_groups import GroupFactory, device_backend, load_nccl_settings
from megatron.core.rank_grid import RankGenerator, levels_of, make_grids

logger = logging.getLogger(__name__)

# Group -> (grid it is cut from, axes that vary inside it, its name in the file of NCCL settings), in the
# order of creation. The expert grid spans the same ranks as the dense one.
GROUP_AXES = {
    "_DATA_PARALLEL_GROUP": ("dense", "dp", "dp"),
    "_DATA_PARALLEL_GROUP_WITH_CP": ("dense", "dp-cp", "dp_cp"),
    "_CONTEXT_PARALLEL_GROUP": ("dense", "cp", "cp"),
    "_MODEL_PARALLEL_GROUP": ("dense", "tp-pp", "mp"),
    "_TENSOR_MODEL_PARALLEL_GROUP": ("dense", "tp", "tp"),
    "_PIPELINE_MODEL_PARALLEL_GROUP": ("dense", "pp", "pp"),
    "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": ("dense", "tp-dp-cp", "tp_dp_cp"),
    "_TENSOR_AND_DATA_PARALLEL_GROUP": ("dense", "tp-dp", "tp_dp"),
    "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": ("dense", "tp-cp", "tp_cp"),
    "_EXPERT_MODEL_PARALLEL_GROUP": ("expert", "ep", "ep"),
    "_EXPERT_TENSOR_PARALLEL_GROUP": ("expert", "tp", "ep_tp"),
    "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": ("expert", "tp-ep", "tp_ep_mp"),
    "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": ("expert", "tp-ep-pp", "tp_ep_pp"),
    "_EXPERT_DATA_PARALLEL_GROUP": ("expert", "dp", "ep_dp"),
}
_INTRA, _INTER = (f"_{kind}_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP" for kind in ("INTRA", "INTER"))
_GLOO_TWINS = (
    "_DATA_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP_WITH_CP",
    _INTRA,
    "_EXPERT_DATA_PARALLEL_GROUP",
)
GROUP_NAMES = frozenset(
    [*GROUP_AXES, _INTRA, _INTER, "_EMBEDDING_GROUP", "_POSITION_EMBEDDING_GROUP"]
    + [f"{name}_GLOO" for name in _GLOO_TWINS]
)
# What a group is for, in settings and sizes by group.
GROUP_LABELS = frozenset(
    [label for _, _, label in GROUP_AXES.values()]
    + ["intra_dp_cp", "inter_dp_cp", "hcp", "embd", "pos_embd", "world"]
)
# Labels of groups whose messages layers wait for, and whose ranks may be those that share gradients: a ring
# of keys must not stand behind a bucket that has just been started.
_IN_LAYERS = frozenset({"cp", "hcp", "ep"})
_PIPELINE_BACKENDS = (None, "nccl", "hccl", "gloo")


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
    timeout = timedelta(minutes=distributed_timeout_minutes)
    settings = _nccl_settings(nccl_communicator_config_path)
    factory = GroupFactory(timeout, nccl_settings=settings, buffers_mb=communicator_buffers_mb)
    planned = _grid_groups(grids)
    planned += _partial_groups(planned, num_distributed_optimizer_instances)
    split = pipeline_model_parallel_split_rank
    planned += _embedding_groups(
        planned,
        get_embedding_ranks or (lambda ranks: default_embedding_ranks(ranks, split)),
        get_position_embedding_ranks or (lambda ranks: default_position_embedding_ranks(ranks, split)),
    )
    _make(factory, planned, hierarchical_context_parallel_sizes)
    _log_communicators(factory, communicator_buffers_mb or {})
    if create_gloo_process_groups:
        twins = GroupFactory(timeout, backend="gloo")
        for name in _GLOO_TWINS:
            ranks = STATE.ranks[name]
            STATE.groups[f"{name}_GLOO"], STATE.ranks[f"{name}_GLOO"] = twins.make(ranks), ranks
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


class _Planned(NamedTuple):
    """A group of this rank that is to be made, or that is another name for one."""

    name: str
    ranks: list[int]
    label: str

    @property
    def in_layers(self) -> bool:
        """Whether layers wait for its messages."""
        return self.label in _IN_LAYERS


def _make(factory: GroupFactory, planned: list[_Planned], levels: list[int] | None) -> None:
    """All groups, each as suits everything that shares it."""
    for group in planned:
        factory.expect(group.ranks, group.label, group.in_layers)
    context = _ranks_of(planned, "_CONTEXT_PARALLEL_GROUP")
    nested = levels_of(context, levels, dist.get_rank()) if levels else []
    for ranks in nested:
        factory.expect(ranks, "hcp", in_layers=True)
    for group in planned:
        STATE.groups[group.name] = factory.make(group.ranks, group.label, group.in_layers)
        STATE.ranks[group.name] = group.ranks
    STATE.hierarchical = [factory.make(ranks, "hcp", in_layers=True) for ranks in nested] or None


def _ranks_of(planned: list[_Planned], name: str) -> list[int]:
    return next(group.ranks for group in planned if group.name == name)


def _grid_groups(grids: dict[str, RankGenerator]) -> list[_Planned]:
    """Groups that vary along some axes of a grid."""
    rank = dist.get_rank()
    return [
        _Planned(name, grids[grid].get_group(axes, rank), label)
        for name, (grid, axes, label) in GROUP_AXES.items()
    ]


def _partial_groups(planned: list[_Planned], instances: int) -> list[_Planned]:
    """Consecutive blocks of the data x context group, and the ranks at the same place of every block."""
    whole = _ranks_of(planned, "_DATA_PARALLEL_GROUP_WITH_CP")
    if instances == 1:
        return [_Planned(_INTRA, whole, "intra_dp_cp")]
    if instances < 1 or len(whole) % instances:
        raise UsageError(
            f"num_distributed_optimizer_instances {instances} does not divide the {len(whole)} ranks of the "
            "data x context parallel group"
        )
    size = len(whole) // instances
    place = whole.index(dist.get_rank())
    block = place // size * size
    return [
        _Planned(_INTRA, whole[block : block + size], "intra_dp_cp"),
        _Planned(_INTER, whole[place % size :: size], "inter_dp_cp"),
    ]


def _embedding_groups(
    planned: list[_Planned],
    get_embedding_ranks: Callable[[list[int]], list[int]],
    get_position_embedding_ranks: Callable[[list[int]], list[int]],
) -> list[_Planned]:
    """Groups of those stages of this rank's pipeline that hold copies of the same embeddings."""
    pipeline = _ranks_of(planned, "_PIPELINE_MODEL_PARALLEL_GROUP")
    chosen = (
        _Planned("_EMBEDDING_GROUP", get_embedding_ranks(pipeline), "embd"),
        _Planned("_POSITION_EMBEDDING_GROUP", get_position_embedding_ranks(pipeline), "pos_embd"),
    )
    return [group for group in chosen if dist.get_rank() in group.ranks]


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
