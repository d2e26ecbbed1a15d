"""Which process groups a rank belongs to, and with which ranks; ``initialization`` creates them."""

from collections.abc import Callable
from typing import NamedTuple

from megatron.core.errors import UsageError
from megatron.core.rank_grid import RankGenerator

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
# Shards of one instance of the distributed optimizer, and the ranks with equal shards in all instances.
_INTRA = "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"
_INTER = "_INTER_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"
# Groups that have a second one for tensors in host memory.
GLOO_TWINS = (
    "_DATA_PARALLEL_GROUP",
    "_DATA_PARALLEL_GROUP_WITH_CP",
    _INTRA,
    "_EXPERT_DATA_PARALLEL_GROUP",
)
GROUP_NAMES = frozenset(
    [*GROUP_AXES, _INTRA, _INTER, "_EMBEDDING_GROUP", "_POSITION_EMBEDDING_GROUP"]
    + [f"{name}_GLOO" for name in GLOO_TWINS]
)
# What a group is for, in settings and sizes by group.
GROUP_LABELS = frozenset(
    [label for _, _, label in GROUP_AXES.values()]
    + ["intra_dp_cp", "inter_dp_cp", "hcp", "embd", "pos_embd", "world"]
)
# Labels of groups whose messages layers wait for, and whose ranks may be those that share gradients: a ring
# of keys must not stand behind a bucket that has just been started.
_IN_LAYERS = frozenset({"cp", "hcp", "ep"})


class PlannedGroup(NamedTuple):
    """A group of this rank that is to be made, or that is another name for one."""

    name: str
    ranks: list[int]
    label: str

    @property
    def in_layers(self) -> bool:
        """Whether layers wait for its messages."""
        return self.label in _IN_LAYERS


def plan_groups(
    grids: dict[str, RankGenerator],
    rank: int,
    optimizer_instances: int,
    get_embedding_ranks: Callable[[list[int]], list[int]],
    get_position_embedding_ranks: Callable[[list[int]], list[int]],
) -> list[PlannedGroup]:
    """Every group of ``rank``, in the order of creation.

    Args:
        grids: the grid of dense layers and the grid of experts, as ``make_grids`` returns them.
        rank: global rank.
        optimizer_instances: copies of the sharded optimizer; divides the ranks of the data x context group.
        get_embedding_ranks: which ranks of a pipeline hold word embeddings.
        get_position_embedding_ranks: which ranks of a pipeline hold position embeddings.

    Raises:
        UsageError: ``optimizer_instances`` does not divide the data x context group.
    """
    planned = [
        PlannedGroup(name, grids[grid].get_group(axes, rank), label)
        for name, (grid, axes, label) in GROUP_AXES.items()
    ]
    planned += _partial_groups(ranks_of(planned, "_DATA_PARALLEL_GROUP_WITH_CP"), rank, optimizer_instances)
    pipeline = ranks_of(planned, "_PIPELINE_MODEL_PARALLEL_GROUP")
    embeddings = (
        PlannedGroup("_EMBEDDING_GROUP", get_embedding_ranks(pipeline), "embd"),
        PlannedGroup("_POSITION_EMBEDDING_GROUP", get_position_embedding_ranks(pipeline), "pos_embd"),
    )
    return planned + [group for group in embeddings if rank in group.ranks]


def ranks_of(planned: list[PlannedGroup], name: str) -> list[int]:
    """Global ranks of the planned group called ``name``."""
    return next(group.ranks for group in planned if group.name == name)


def _partial_groups(whole: list[int], rank: int, instances: int) -> list[PlannedGroup]:
    """Consecutive blocks of the data x context group, and the ranks at the same place of every block."""
    if instances == 1:
        return [PlannedGroup(_INTRA, whole, "intra_dp_cp")]
    if instances < 1 or len(whole) % instances:
        raise UsageError(
            f"num_distributed_optimizer_instances {instances} does not divide the {len(whole)} ranks of the "
            "data x context parallel group"
        )
    size = len(whole) // instances
    place = whole.index(rank)
    block = place // size * size
    return [
        PlannedGroup(_INTRA, whole[block : block + size], "intra_dp_cp"),
        PlannedGroup(_INTER, whole[place % size :: size], "inter_dp_cp"),
    ]


def default_embedding_ranks(pp_ranks: list[int], split_rank: int | None = None) -> list[int]:
    """Stages of a pipeline that hold word embeddings: first, last and, if given, the split stage."""
    split = [] if split_rank is None else [pp_ranks[split_rank]]
    return list(dict.fromkeys([pp_ranks[0], *split, pp_ranks[-1]]))


def default_position_embedding_ranks(pp_ranks: list[int], split_rank: int | None = None) -> list[int]:
    """Stages of a pipeline that hold position embeddings: the first and, if given, the split stage."""
    split = [] if split_rank is None else [pp_ranks[split_rank]]
    return list(dict.fromkeys([pp_ranks[0], *split]))
