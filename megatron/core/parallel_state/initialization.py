"""Creating the groups of this rank, and forgetting them."""

import logging
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.parallel_state.state import STATE
from megatron.core.process_groups import GroupFactory, load_nccl_settings
from megatron.core.rank_grid import RankGenerator, levels_of, make_grids
from megatron.core.utils import GlobalMemoryBuffer

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

    Raises:
        ConfigError: sizes that do not fit the world or each other, or a second call without
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
    factory = GroupFactory(timeout, nccl_settings=settings)
    _create_grid_groups(factory, grids)
    _create_partial_groups(factory, num_distributed_optimizer_instances)
    STATE.hierarchical = _create_hierarchy(factory, hierarchical_context_parallel_sizes)
    split = pipeline_model_parallel_split_rank
    _create_embedding_groups(
        factory,
        get_embedding_ranks or (lambda ranks: default_embedding_ranks(ranks, split)),
        get_position_embedding_ranks or (lambda ranks: default_position_embedding_ranks(ranks, split)),
    )
    if create_gloo_process_groups:
        twins = GroupFactory(timeout, backend="gloo")
        for name in _GLOO_TWINS:
            _keep(f"{name}_GLOO", twins, STATE.ranks[name])
    STATE.by_hand["split_rank"] = split
    if virtual_pipeline_model_parallel_size is not None:
        STATE.by_hand.update(vpp_size=virtual_pipeline_model_parallel_size, vpp_rank=0)
    STATE.memory_buffer = GlobalMemoryBuffer()


def _check_request(
    stages: int, virtual_stages: int | None, pipeline_backend: str | None, has_encoder: bool
) -> None:
    """What cannot work whatever the world."""
    if not dist.is_initialized():
        raise ConfigError("call torch.distributed.init_process_group() before initialize_model_parallel()")
    if is_initialized():
        raise ConfigError("model parallel groups exist already: call destroy_model_parallel() first")
    if has_encoder:
        raise NotBuiltYetError("an encoder on ranks of its own")
    if pipeline_backend not in _PIPELINE_BACKENDS:
        raise ConfigError(
            f"pipeline_model_parallel_comm_backend {pipeline_backend!r}: use one of "
            f"{', '.join(map(str, _PIPELINE_BACKENDS))}"
        )
    if virtual_stages is not None and stages < 2:
        raise ConfigError(
            f"virtual_pipeline_model_parallel_size {virtual_stages} with one pipeline "
            "stage: leave it unset, or use 2 or more stages"
        )


def _nccl_settings(path: str | None) -> dict | None:
    if path is None:
        return None
    if dist.get_backend() != "nccl":
        logger.warning(
            "%s holds NCCL settings: the backend is %s, so they have no effect", path, dist.get_backend()
        )
        return None
    return load_nccl_settings(path)


def _keep(name: str, factory: GroupFactory, ranks: list[int], label: str | None = None) -> None:
    STATE.groups[name], STATE.ranks[name] = factory.make(ranks, label), ranks


def _create_grid_groups(factory: GroupFactory, grids: dict[str, RankGenerator]) -> None:
    """Groups that vary along some axes of a grid."""
    rank = dist.get_rank()
    for name, (grid, axes, label) in GROUP_AXES.items():
        _keep(name, factory, grids[grid].get_group(axes, rank), label)


def _create_partial_groups(factory: GroupFactory, instances: int) -> None:
    """Consecutive blocks of the data x context group, and the ranks at the same place of every block."""
    whole = STATE.ranks["_DATA_PARALLEL_GROUP_WITH_CP"]
    if instances == 1:
        STATE.groups[_INTRA] = STATE.groups["_DATA_PARALLEL_GROUP_WITH_CP"]
        STATE.ranks[_INTRA] = whole
        return
    if instances < 1 or len(whole) % instances:
        raise ConfigError(
            f"num_distributed_optimizer_instances {instances} does not divide the {len(whole)} ranks of the "
            "data x context parallel group"
        )
    size = len(whole) // instances
    place = whole.index(dist.get_rank())
    block = place // size * size
    _keep(_INTRA, factory, whole[block : block + size], "intra_dp_cp")
    _keep(_INTER, factory, whole[place % size :: size], "inter_dp_cp")


def _create_hierarchy(factory: GroupFactory, sizes: list[int] | None) -> list[ProcessGroup] | None:
    if not sizes:
        return None
    groups = levels_of(STATE.ranks["_CONTEXT_PARALLEL_GROUP"], sizes, dist.get_rank())
    return [factory.make(ranks, "hcp") for ranks in groups]


def _create_embedding_groups(
    factory: GroupFactory,
    get_embedding_ranks: Callable[[list[int]], list[int]],
    get_position_embedding_ranks: Callable[[list[int]], list[int]],
) -> None:
    """Groups of those stages of this rank's pipeline that hold copies of the same embeddings."""
    pipeline = STATE.ranks["_PIPELINE_MODEL_PARALLEL_GROUP"]
    for name, choose, label in (
        ("_EMBEDDING_GROUP", get_embedding_ranks, "embd"),
        ("_POSITION_EMBEDDING_GROUP", get_position_embedding_ranks, "pos_embd"),
    ):
        ranks = choose(pipeline)
        if dist.get_rank() in ranks:
            _keep(name, factory, ranks, label)


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
        ConfigError: the sizes do not multiply to ``group_size``.
    """
    if len(ranks) != group_size:
        raise ConfigError(f"group_size {group_size} differs from the {len(ranks)} ranks given")
    factory = GroupFactory(None, options=pg_options)
    return [factory.make(members, "hcp") for members in levels_of(ranks, hierarchical_group_sizes, rank)]


def is_initialized() -> bool:
    """True when the data-parallel group exists."""
    return STATE.groups.get("_DATA_PARALLEL_GROUP") is not None


def is_unitialized() -> bool:
    """Old opposite of ``is_initialized``, spelled as ever."""
    warnings.warn("is_unitialized() is now: not is_initialized()", DeprecationWarning, stacklevel=2)
    return not is_initialized()


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
        raise AssertionError("global memory buffer is not initialized: call initialize_model_parallel()")
    return STATE.memory_buffer


def destroy_global_memory_buffer() -> None:
    """Drop the scratch buffers."""
    STATE.memory_buffer = None
