"""Process groups of a world of one, and sizes that do not fit a world."""

import pytest
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.parallel_state.groups import (
    default_embedding_ranks,
    default_position_embedding_ranks,
    plan_groups,
)
from megatron.core.rank_grid import make_grids


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_getters_need_groups():
    with pytest.raises(AssertionError, match="tensor model parallel group is not initialized"):
        parallel_state.get_tensor_model_parallel_group()
    assert parallel_state.get_tensor_model_parallel_group(check_initialized=False) is None
    assert parallel_state.get_data_parallel_world_size() == 0


def test_groups_need_torch_distributed():
    with pytest.raises(ConfigError, match="init_process_group"):
        parallel_state.initialize_model_parallel()


def test_one_process_is_first_and_last_of_everything(world_of_one):
    parallel_state.initialize_model_parallel()
    assert parallel_state.model_parallel_is_initialized()
    for axis in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel", "data_parallel"):
        assert getattr(parallel_state, f"get_{axis}_world_size")() == 1
        assert getattr(parallel_state, f"get_{axis}_rank")() == 0
    assert parallel_state.is_pipeline_first_stage() and parallel_state.is_pipeline_last_stage()
    assert parallel_state.is_rank_in_embedding_group()
    assert parallel_state.get_all_ranks() == "0_0_0_0_0"
    # Same members, same group: a world of one pays for one group and its host-memory twin.
    assert parallel_state.get_model_parallel_group() is parallel_state.get_data_parallel_group()
    with pytest.raises(ConfigError, match="destroy_model_parallel"):
        parallel_state.initialize_model_parallel()


def test_values_set_by_hand_win(world_of_one):
    parallel_state.initialize_model_parallel()
    parallel_state.set_tensor_model_parallel_world_size(4)
    parallel_state.set_tensor_model_parallel_rank(3)
    assert parallel_state.get_tensor_model_parallel_world_size() == 4
    assert parallel_state.get_tensor_model_parallel_rank() == 3
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    assert parallel_state.get_tensor_model_parallel_world_size() == 1


def test_layouts_that_cannot_work_are_refused(world_of_one):
    with pytest.raises(NotBuiltYetError, match="encoder on ranks of its own"):
        parallel_state.initialize_model_parallel(encoder_pipeline_model_parallel_size=1)
    with pytest.raises(ConfigError, match="with one pipeline stage"):
        parallel_state.initialize_model_parallel(virtual_pipeline_model_parallel_size=2)
    with pytest.raises(ConfigError, match="'ucc': use one of"):
        parallel_state.initialize_model_parallel(pipeline_model_parallel_comm_backend="ucc")
    with pytest.raises(ConfigError, match="tensor parallel size 0"):
        parallel_state.initialize_model_parallel(0)
    with pytest.raises(ConfigError, match=r"2 2 multiply to 4, not to the context parallel size 1"):
        parallel_state.initialize_model_parallel(hierarchical_context_parallel_sizes=[2, 2])
    parallel_state.destroy_model_parallel()
    with pytest.raises(ConfigError, match="instances 2 does not divide the 1 ranks"):
        parallel_state.initialize_model_parallel(num_distributed_optimizer_instances=2)


def test_groups_are_readable_and_swappable_variables(world_of_one, monkeypatch):
    assert parallel_state._TENSOR_MODEL_PARALLEL_GROUP is None
    parallel_state.initialize_model_parallel()
    assert parallel_state._PIPELINE_GLOBAL_RANKS == [0]
    other = dist.new_group([0])
    with monkeypatch.context() as patch:
        patch.setattr(parallel_state, "_TENSOR_MODEL_PARALLEL_GROUP", other)
        assert parallel_state.get_tensor_model_parallel_group() is other
        assert parallel_state.get_amax_reduction_group(tp_only_amax_red=True) is other
    assert parallel_state.get_tensor_model_parallel_group() is not other
    with pytest.raises(AttributeError, match="_NO_SUCH_GROUP"):
        parallel_state._NO_SUCH_GROUP  # noqa: B018


def test_composed_getters_see_replacements(monkeypatch):
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: 2)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 4)
    assert not parallel_state.is_pipeline_first_stage() and not parallel_state.is_pipeline_last_stage()
    assert parallel_state.is_inside_encoder() and parallel_state.is_inside_decoder()
    parallel_state.set_pipeline_model_parallel_split_rank(3)
    assert parallel_state.is_pipeline_stage_before_split() and parallel_state.is_pipeline_stage_at_split()
    assert not parallel_state.is_pipeline_stage_after_split()
    assert parallel_state.is_pipeline_stage_after_split(3)
    parallel_state.destroy_model_parallel()
    assert parallel_state.get_pipeline_model_parallel_split_rank() is None


def test_expert_tensor_axis_follows_the_dense_one_before_initialisation():
    parallel_state.set_tensor_model_parallel_world_size(4)
    parallel_state.set_tensor_model_parallel_rank(1)
    assert parallel_state.get_expert_tensor_parallel_world_size() == 4
    assert parallel_state.get_expert_tensor_parallel_rank() == 1
    parallel_state.set_expert_tensor_parallel_world_size(2)
    assert parallel_state.get_expert_tensor_parallel_world_size() == 2
    parallel_state.destroy_model_parallel()


def test_shard_groups_need_the_context_axis(world_of_one):
    parallel_state.initialize_model_parallel()
    whole = parallel_state.get_data_parallel_group(with_context_parallel=True)
    assert parallel_state.get_data_parallel_group(True, partial_data_parallel=True) is whole
    with pytest.raises(AssertionError, match="with_context_parallel=True"):
        parallel_state.get_data_parallel_group(partial_data_parallel=True)
    with pytest.raises(AssertionError, match="inter partial"):
        parallel_state.get_inter_partial_data_parallel_group()


def test_world_that_does_not_divide_names_sizes_that_would():
    with pytest.raises(ConfigError, match=r"world of 6 ranks .* = 4 ranks: start 4 or 8 ranks"):
        make_grids(6, tp=2, pp=2, cp=1, ep=1, expert_tp=2, order="tp-cp-ep-dp-pp")
    with pytest.raises(ConfigError, match="different pipelines"):
        make_grids(8, tp=2, pp=2, cp=1, ep=1, expert_tp=1, order="tp-cp-ep-pp-dp")


def test_groups_of_a_rank_are_planned_without_a_world():
    """16 ranks, the tensor axis the fastest, then context (or experts), data and pipeline: by hand."""
    grids = make_grids(16, tp=2, pp=2, cp=2, ep=2, expert_tp=2, order="tp-cp-ep-dp-pp")
    plan = plan_groups(grids, 5, 2, default_embedding_ranks, default_position_embedding_ranks)
    ranks = {group.name: group.ranks for group in plan}
    assert ranks["_TENSOR_MODEL_PARALLEL_GROUP"] == ranks["_EXPERT_TENSOR_PARALLEL_GROUP"] == [4, 5]
    assert ranks["_CONTEXT_PARALLEL_GROUP"] == ranks["_EXPERT_MODEL_PARALLEL_GROUP"] == [5, 7]
    assert ranks["_DATA_PARALLEL_GROUP"] == ranks["_EXPERT_DATA_PARALLEL_GROUP"] == [1, 5]
    assert ranks["_DATA_PARALLEL_GROUP_WITH_CP"] == [1, 3, 5, 7]
    assert ranks["_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"] == [5, 7]
    assert ranks["_INTER_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP"] == [1, 5]
    assert ranks["_PIPELINE_MODEL_PARALLEL_GROUP"] == ranks["_EMBEDDING_GROUP"] == [5, 13]
    assert ranks["_POSITION_EMBEDDING_GROUP"] == [5]
    last = plan_groups(grids, 13, 2, default_embedding_ranks, default_position_embedding_ranks)
    assert "_POSITION_EMBEDDING_GROUP" not in {group.name for group in last}


def test_groups_whose_messages_layers_wait_for_are_those_of_context_and_experts():
    grids = make_grids(16, tp=2, pp=2, cp=2, ep=2, expert_tp=2, order="tp-cp-ep-dp-pp")
    plan = plan_groups(grids, 5, 1, default_embedding_ranks, default_position_embedding_ranks)
    in_layers = {group.name for group in plan if group.in_layers}
    assert in_layers == {"_CONTEXT_PARALLEL_GROUP", "_EXPERT_MODEL_PARALLEL_GROUP"}
