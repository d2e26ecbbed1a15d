"""Groups of real ranks talk to each other; groups of large worlds are counted under a fake backend."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.errors import ConfigError
from megatron.core.parallel_state.groups import GROUP_AXES
from megatron.core.process_groups import get_nccl_options, load_nccl_settings
from megatron.core.rank_grid import make_grids
from tests.distributed.pool import run_ranks

LAYOUTS = [
    dict(tp=2, pp=2, cp=2, ep=1, expert_tp=2),
    dict(tp=1, pp=4, cp=1, ep=2, expert_tp=1),
    dict(tp=4, pp=1, cp=2, ep=2, expert_tp=2),
    dict(tp=2, pp=4, cp=1, ep=1, expert_tp=1),
]


def initialize(tp: int, pp: int, cp: int, ep: int, expert_tp: int, **options) -> None:
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=expert_tp,
        **options,
    )


def members_by_talking(group: dist.ProcessGroup) -> list[int]:
    """Global ranks in a group, as its members tell each other."""
    gathered = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, torch.tensor([dist.get_rank()]), group=group)
    return [int(rank) for rank in gathered]


def talk_in_every_group(layouts: list[dict]) -> list[dict[str, list[int]]]:
    found = []
    for layout in layouts:
        initialize(**layout)
        groups = dict(parallel_state.state.STATE.groups)
        found.append({name: members_by_talking(group) for name, group in groups.items()})
        parallel_state.destroy_model_parallel()
    return found


def test_members_find_each_other_in_every_layout():
    """Several layouts in one process: a second initialisation makes groups of its own."""
    answers = run_ranks(8, talk_in_every_group, [*LAYOUTS, LAYOUTS[0]])
    for number, layout in enumerate([*LAYOUTS, LAYOUTS[0]]):
        grids = make_grids(8, order="tp-cp-ep-dp-pp", **layout)
        for name, (grid, axes, _) in GROUP_AXES.items():
            for ranks in grids[grid].get_ranks(axes):
                for rank in ranks:
                    assert answers[rank][number][name] == ranks, (layout, name)
        pipelines = grids["dense"].get_ranks("pp")
        for stages in pipelines:
            for rank in stages:
                groups = answers[rank][number]
                ends = list(dict.fromkeys([stages[0], stages[-1]]))
                assert groups.get("_EMBEDDING_GROUP") == (ends if rank in ends else None)
                first = stages[:1] if rank == stages[0] else None
                assert groups.get("_POSITION_EMBEDDING_GROUP") == first
        assert {"_DATA_PARALLEL_GROUP_GLOO", "_EXPERT_DATA_PARALLEL_GROUP_GLOO"} <= answers[0][number].keys()


def shared_groups(layout: dict) -> dict[str, set[str]]:
    """Names of the groups of more than one rank, and of all that are the same group."""
    initialize(**layout)
    groups = {
        name.strip("_").removesuffix("_GROUP"): group
        for name, group in parallel_state.state.STATE.groups.items()
        if dist.get_world_size(group) > 1 and not name.endswith("_GLOO")
    }
    return {name: {other for other in groups if groups[other] is groups[name]} for name in groups}


def test_gradients_do_not_share_a_group_with_what_layers_wait_for():
    """A device keeps the order of a group's messages: a ring would wait for buckets of gradients."""
    partial = "INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"
    data = {"DATA_PARALLEL_GROUP_WITH_CP", "EXPERT_DATA_PARALLEL", partial}
    for shared in run_ranks(4, shared_groups, dict(tp=1, pp=1, cp=4, ep=1, expert_tp=1)):
        assert shared["CONTEXT_PARALLEL"] == {"CONTEXT_PARALLEL"}
        assert all(data <= shared[name] for name in data)
    for shared in run_ranks(4, shared_groups, dict(tp=1, pp=1, cp=1, ep=4, expert_tp=1)):
        assert shared["EXPERT_MODEL_PARALLEL"] == {"EXPERT_MODEL_PARALLEL"}
    # What layers do not wait for still shares.
    for shared in run_ranks(4, shared_groups, dict(tp=1, pp=1, cp=1, ep=1, expert_tp=1)):
        assert {"DATA_PARALLEL", *data} <= shared["DATA_PARALLEL"]


def all_but_one(ranks: list[int]) -> list[int]:
    return ranks[1:]


def unequal_numbers_of_groups() -> list[list[int]]:
    """The first stage has one group less than the others when the position embedding group is made."""
    initialize(
        tp=1,
        pp=4,
        cp=1,
        ep=1,
        expert_tp=1,
        get_embedding_ranks=all_but_one,
        get_position_embedding_ranks=lambda ranks: [ranks[0], ranks[2]],
        create_gloo_process_groups=False,
    )
    groups = parallel_state.state.STATE.groups
    names = ("_EMBEDDING_GROUP", "_POSITION_EMBEDDING_GROUP")
    return [members_by_talking(groups[name]) for name in names if name in groups]


def test_ranks_with_different_numbers_of_groups_find_each_other():
    assert run_ranks(4, unequal_numbers_of_groups) == [
        [[0, 2]],
        [[1, 2, 3]],
        [[1, 2, 3], [0, 2]],
        [[1, 2, 3]],
    ]


def tensor_and_data_members() -> list[list[int]]:
    parallel_state.initialize_model_parallel(2, context_parallel_size=2, create_gloo_process_groups=False)
    groups = (
        parallel_state.get_tensor_and_data_parallel_group(with_context_parallel)
        for with_context_parallel in (False, True)
    )
    return [dist.get_process_group_ranks(group) for group in groups]


def test_tensor_and_data_ranks_with_and_without_the_context_axis():
    # Ranks in the order tensor, context, data.
    without = {0: [0, 1, 4, 5], 2: [2, 3, 6, 7]}
    for rank, members in enumerate(run_ranks(8, tensor_and_data_members)):
        assert members == [without[rank // 2 % 2 * 2], list(range(8))]


def levels_and_instances() -> tuple[list[list[int]], list[int], list[int], tuple[int, int]]:
    parallel_state.initialize_model_parallel(
        context_parallel_size=4,
        hierarchical_context_parallel_sizes=[2, 2],
        num_distributed_optimizer_instances=2,
    )
    shard = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
    return (
        [members_by_talking(group) for group in parallel_state.get_hierarchical_context_parallel_groups()],
        members_by_talking(shard),
        members_by_talking(parallel_state.get_inter_partial_data_parallel_group()),
        (
            parallel_state.get_data_parallel_world_size(True, True),
            parallel_state.get_data_parallel_rank(True, True),
        ),
    )


def test_context_levels_and_optimizer_instances():
    answers = run_ranks(8, levels_and_instances)
    assert answers[5] == ([[4, 5], [5, 7]], [4, 5, 6, 7], [1, 5], (4, 1))
    assert answers[2] == ([[2, 3], [0, 2]], [0, 1, 2, 3], [2, 6], (4, 2))


def virtual_stages() -> tuple:
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3
    )
    flags = []
    for chunk in range(3):
        parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        flags.append(
            (
                parallel_state.is_pipeline_first_stage(),
                parallel_state.is_pipeline_last_stage(),
                parallel_state.is_rank_in_embedding_group(),
            )
        )
    neighbours = (
        parallel_state.get_pipeline_model_parallel_prev_rank(),
        parallel_state.get_pipeline_model_parallel_next_rank(),
    )
    return parallel_state.get_virtual_pipeline_model_parallel_world_size(), flags, neighbours


def test_virtual_stages():
    first, last = run_ranks(2, virtual_stages)
    inner = (False, False, False)
    assert first == (3, [(True, False, True), inner, inner], (1, 1))
    assert last == (3, [inner, inner, (False, True, True)], (0, 0))


def test_nccl_settings_by_group(tmp_path):
    path = tmp_path / "nccl.yaml"
    path.write_text("dp: {cga_cluster_size: 2, max_ctas: 16}\n")
    settings = load_nccl_settings(str(path))
    assert settings == {"dp": {"cga_cluster_size": 2, "max_ctas": 16}}
    assert parallel_state.get_nccl_options("tp", settings) is None
    if not dist.is_nccl_available():
        with pytest.raises(ConfigError, match="has no NCCL, so no options for dp"):
            parallel_state.get_nccl_options("dp", settings)
    else:
        assert parallel_state.get_nccl_options("dp", settings).config.max_ctas == 16
    for content, part in (("[1, 2]", "give names of groups"), ("{", "cannot be read")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=part):
            load_nccl_settings(str(path))


@pytest.fixture
def fake_world():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    started = []

    def start(rank: int, world_size: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        started.append(rank)

    yield start
    parallel_state.destroy_model_parallel()
    if started:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [64, 1024, 16384])
def test_a_rank_creates_its_own_groups_only(world_size: int, fake_world, monkeypatch):
    """14 axis combinations and the two embedding groups, whatever the world; equal members share a group."""
    layout = dict(tp=4, pp=4, cp=2, ep=4, expert_tp=2)
    rank = world_size // 4 + 5  # second stage: in no embedding group
    made = []
    original = dist.new_group
    monkeypatch.setattr(dist, "new_group", lambda ranks, **k: made.append(ranks) or original(ranks, **k))
    fake_world(rank, world_size)
    initialize(**layout, create_gloo_process_groups=False)
    grids = make_grids(world_size, order="tp-cp-ep-dp-pp", **layout)
    own = {}
    for name, (grid, axes, _) in GROUP_AXES.items():
        own[name] = next(ranks for ranks in grids[grid].get_ranks(axes) if rank in ranks)
        assert parallel_state.state.STATE.ranks[name] == own[name], name
    assert sorted(made) == sorted([list(ranks) for ranks in {tuple(ranks) for ranks in own.values()}])
    assert len(made) <= len(GROUP_AXES)


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({}, {"cga_cluster_size": 4, "max_ctas": 32, "min_ctas": 1}),
        (
            {"cga_cluster_size": 2, "max_ctas": 16, "min_ctas": 8, "net_name": "IB"},
            {"cga_cluster_size": 2, "max_ctas": 16, "min_ctas": 8, "net_name": "IB"},
        ),
    ],
)
def test_settings_of_nccl_and_their_defaults(entry, wanted, monkeypatch):
    """NCCL's options class exists only in builds of torch that have it."""
    options = SimpleNamespace(config=SimpleNamespace())
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=lambda: options), raising=False)
    assert get_nccl_options("tp", {"dp": entry}) is None
    assert get_nccl_options("dp", {"dp": entry}) is options
    assert vars(options.config) == wanted
