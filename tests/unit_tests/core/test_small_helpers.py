"""Small helpers of the core by values made by hand."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state, utils
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.errors import ConfigError, NotBuiltYetError, UsageError
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import RerunDataIterator, RerunDiagnostic, RerunErrorInjector
from megatron.core.utils import (
    drain_embedding_wgrad_compute,
    get_data_parallel_group_if_dtensor,
    get_full_tensor_if_necessary,
    log_on_each_pipeline_stage,
    log_single_rank,
    prepare_input_tensors_for_wgrad_compute,
    to_local_if_dtensor,
)
from tests.distributed.pool import run_ranks

S, B, H, V = 3, 2, 4, 5


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def left_for_later():
    """Activations and output gradients of two micro-batches, and the weight gradient they make."""
    inputs, grads = ([drawn(S, B, n, seed=10 * n + i) for i in range(2)] for n in (H, V))
    wanted = sum(torch.einsum("sbv,sbh->vh", g, x) for x, g in zip(inputs, grads, strict=True))
    return inputs, grads, wanted


@pytest.mark.parametrize("earlier", [False, True])
def test_weight_gradients_left_for_later_are_added(earlier):
    config = SimpleNamespace(sequence_parallel=False)
    weight = torch.nn.Parameter(drawn(V, H))
    before = drawn(V, H, seed=5) if earlier else torch.zeros(V, H, dtype=torch.float64)
    weight.grad = before.clone() if earlier else None
    inputs, grads, wanted = left_for_later()
    drain_embedding_wgrad_compute(config, inputs, grads, weight)
    torch.testing.assert_close(weight.grad, before + wanted)
    assert inputs == grads == []

    weight.grad, weight.main_grad = None, before.clone()
    inputs, grads, wanted = left_for_later()
    drain_embedding_wgrad_compute(config, inputs, grads, weight)
    torch.testing.assert_close(weight.main_grad, before + wanted)
    assert weight.grad is None and weight.grad_added_to_main_grad


def test_weight_gradients_need_both_operands():
    inputs, grads, _ = left_for_later()
    with pytest.raises(UsageError, match="1 activations of the output layer but 2 gradients"):
        drain_embedding_wgrad_compute(SimpleNamespace(), inputs[:1], grads, torch.nn.Parameter(drawn(V, H)))


def drain_split_sequence():
    rank = dist.get_rank()
    parallel_state.initialize_model_parallel(2)
    x, grad = drawn(2 * S, B, H), drawn(2 * S, B, V, seed=1)
    weight = torch.nn.Parameter(drawn(V, H))
    config = SimpleNamespace(sequence_parallel=True)
    drain_embedding_wgrad_compute(config, [x.chunk(2)[rank]], [grad], weight)
    torch.testing.assert_close(weight.grad, torch.einsum("sbv,sbh->vh", grad, x))


def test_weight_gradients_of_a_split_sequence():
    run_ranks(2, drain_split_sequence)


def test_operands_of_a_weight_gradient_are_rows():
    grad, x = drawn(S, B, V).transpose(0, 1), drawn(S, B, H).transpose(0, 1)
    rows = prepare_input_tensors_for_wgrad_compute(grad, x)
    assert [tuple(t.shape) for t in rows] == [(S * B, V), (S * B, H)]
    assert all(t.is_contiguous() for t in rows) and torch.equal(rows[0], grad.reshape(-1, V))
    assert torch.equal(rows[1], x.reshape(-1, H))


class Spread:
    """Stands in for a DTensor that lies on the ranks of a mesh."""

    def __init__(self, rows: int, ranks: int, group: str = "its group", dims: int = 2):
        self.shape, self._dims = (rows, 3)[:dims], dims
        self.device_mesh = SimpleNamespace(size=lambda: ranks, get_group=lambda: group)

    def dim(self) -> int:
        return self._dims

    def full_tensor(self) -> str:
        return "whole"

    def to_local(self) -> str:
        return "part"


@pytest.mark.parametrize(
    ("rows", "ranks", "whole"),
    # Rows of each rank: 2 2 2 2; 2 2 1; 2 2 1 0; 1 1 0 0; 2 1; 3 3 3 0; 2 2 2 1.
    [(8, 4, False), (5, 3, False), (5, 4, True), (2, 4, True), (3, 2, False), (9, 4, True), (7, 4, False)],
)
def test_a_tensor_is_gathered_when_some_ranks_hold_nothing(rows, ranks, whole):
    spread = Spread(rows, ranks)
    assert get_full_tensor_if_necessary(spread) is ("whole" if whole else spread)


def test_groups_and_parts_of_spread_tensors():
    plain, spread = torch.ones(3), Spread(4, 2)
    assert get_full_tensor_if_necessary(plain) is plain and to_local_if_dtensor(plain) is plain
    assert to_local_if_dtensor(spread) == "part"
    assert get_data_parallel_group_if_dtensor(plain, "any") is None
    assert get_data_parallel_group_if_dtensor(spread) == "its group"
    assert get_data_parallel_group_if_dtensor(spread, "its group") == "its group"
    with pytest.raises(UsageError, match=r"\(4, 3\) is spread over another group"):
        get_data_parallel_group_if_dtensor(spread, "another")
    scalar = Spread(1, 2, dims=0)
    assert get_full_tensor_if_necessary(scalar) is scalar


def compare_replicas(different):
    parallel_state.initialize_model_parallel()
    model = [torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)]
    for parameter in (p for chunk in model for p in chunk.parameters()):
        torch.nn.init.constant_(parameter, 0.5)
    if dist.get_rank() in different:
        with torch.no_grad():
            model[1].bias[1] += 2**-20
    return [utils.check_param_hashes_across_dp_replicas(model, cross_check=both) for both in (False, True)]


@pytest.mark.parametrize(
    ("different", "found"),
    [
        ((), [[True, True]] * 3),
        ((1,), [[True, False], [False, False], [True, False]]),
        ((0, 1, 2), [[True, True]] * 3),
    ],
)
def test_replicas_that_differ_in_one_bit_are_noticed(different, found):
    assert run_ranks(3, compare_replicas, different) == found


def who_logs():
    parallel_state.initialize_model_parallel(2, 2, create_gloo_process_groups=False)
    said = []
    logger = SimpleNamespace(log=lambda level, text: said.append(text))
    log_single_rank(logger, logging.INFO, "rank 0")
    log_single_rank(logger, logging.INFO, "rank 2", rank=2)
    log_on_each_pipeline_stage(logger, logging.INFO, "stage")
    return said, parallel_state.get_pipeline_model_parallel_rank()


def test_ranks_that_log():
    results = run_ranks(8, who_logs)
    assert [rank for rank, (said, _) in enumerate(results) if "rank 0" in said] == [0]
    assert [rank for rank, (said, _) in enumerate(results) if "rank 2" in said] == [2]
    # Tensor-parallel ranks are neighbours, then come data-parallel ones, then stages.
    stages = [(rank, stage) for rank, (said, stage) in enumerate(results) if "stage" in said]
    assert stages == [(0, 0), (4, 1)]


def which_context_ranks_log():
    parallel_state.initialize_model_parallel(context_parallel_size=2, create_gloo_process_groups=False)
    said = []
    log_on_each_pipeline_stage(SimpleNamespace(log=lambda level, text: said.append(text)), 30, "stage")
    return said


def test_one_context_parallel_rank_of_a_stage_logs():
    assert run_ranks(4, which_context_ranks_log) == [["stage"], [], [], []]


def test_everybody_logs_without_process_groups():
    said = []
    logger = SimpleNamespace(log=lambda *args: said.append(args))
    log_single_rank(logger, 20, "one", rank=3)
    log_on_each_pipeline_stage(logger, 30, "two")
    assert said == [(20, "one"), (30, "two")]


def batch_of_one_rank():
    parallel_state.initialize_model_parallel()
    batch = {"tokens": torch.arange(7)[None]}  # does not divide into chunks
    return utils.get_batch_on_this_cp_rank(batch) is batch


def test_a_batch_of_one_rank_stays_as_it_is():
    assert run_ranks(1, batch_of_one_rank) == [True]


def split_batch():
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    tokens = torch.arange(16).view(2, 8)
    mask = torch.arange(64).view(1, 1, 8, 8)
    return utils.get_batch_on_this_cp_rank({"tokens": tokens, "attention_mask": mask, "labels": None})


def test_a_batch_of_two_ranks_is_cut_along_the_sequence():
    for found, places in zip(run_ranks(2, split_batch), ([0, 1, 6, 7], [2, 3, 4, 5]), strict=True):
        assert found["tokens"].tolist() == [places, [8 + place for place in places]]
        assert found["attention_mask"].tolist() == [[[[8 * p + k for k in range(8)] for p in places]]]
        assert found["labels"] is None


def test_the_longest_packed_sequence():
    ends = torch.tensor([0, 3, 10, 12])
    keys = torch.tensor([0, 2, 7, 16])
    assert PackedSeqParams("thd", ends, keys).longest() == 9
    assert PackedSeqParams("thd", keys, ends).longest() == 9
    assert PackedSeqParams("thd", ends, ends, max_seqlen_q=torch.tensor(40)).longest() == 40
    assert PackedSeqParams("thd", ends, ends, max_seqlen_q=5, max_seqlen_kv=6).longest() == 6


def test_configs_are_written_once_a_call(tmp_path):
    directory = tmp_path / "configs"
    config = SimpleNamespace(config_logger_dir=str(directory))
    values = {
        "self": config, "size": 3, "dtype": torch.bfloat16, "weight": torch.zeros(2, 3),
        "function": drawn, "settings": ModelParallelConfig(), "__class__": 1,
    }  # fmt: skip
    assert has_config_logger_enabled(config) and not has_config_logger_enabled(SimpleNamespace())
    assert not has_config_logger_enabled(SimpleNamespace(config_logger_dir=None))
    for _ in range(2):
        log_config_to_disk(config, values)
    log_config_to_disk(config, {"size": 1}, prefix="named")
    log_config_to_disk(config, {"size": 2})
    log_config_to_disk(SimpleNamespace(config_logger_dir=""), values)
    assert sorted(path.name for path in directory.iterdir()) == [
        "SimpleNamespace.rank_0.iter0.json", "SimpleNamespace.rank_0.iter1.json",
        "config.rank_0.iter0.json", "named.rank_0.iter0.json",
    ]  # fmt: skip
    read = json.loads((directory / "SimpleNamespace.rank_0.iter1.json").read_text())
    assert read.keys() == {"size", "dtype", "weight", "function", "settings"}
    assert (read["size"], read["dtype"]) == (3, "torch.bfloat16")
    assert read["weight"] == "tensor(2, 3) torch.float32" and read["function"].endswith("small_helpers.drawn")
    assert read["settings"]["tensor_model_parallel_size"] == 1


TP, PP = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32},
)
DEFERRAL = {"defer_embedding_wgrad_compute": True, "gradient_accumulation_fusion": True}
FLUSH = {"overlap_p2p_comm_warmup_flush": True, "overlap_p2p_comm": True, "batch_p2p_comm": False}


@pytest.mark.parametrize(
    ("fits", "breaks", "message"),
    [
        (TP | {"sequence_parallel": True}, {"tensor_model_parallel_size": 1}, "raise it above 1"),
        (PP, {"pipeline_dtype": None}, "pipeline_dtype: unset"),
        (
            TP | {"expert_model_parallel_size": 2, "sequence_parallel": True},
            {"sequence_parallel": False},
            "set sequence_parallel=True",
        ),
        (PP | DEFERRAL, {"pipeline_model_parallel_size": 1}, "it must be above 1"),
        (PP | DEFERRAL, {"gradient_accumulation_fusion": False}, "set gradient_accumulation_fusion=True"),
        (PP | DEFERRAL | {"wgrad_deferral_limit": 0}, {"wgrad_deferral_limit": -1}, "-1 is negative"),
        ({"tp_comm_chunks": 1}, {"tp_comm_chunks": 0}, "0 is not positive"),
        (FLUSH, {"overlap_p2p_comm": False}, "set overlap_p2p_comm=True"),
        (FLUSH, {"batch_p2p_comm": True}, "set overlap_p2p_comm=True and batch_p2p_comm=False"),
    ],
)
def test_settings_that_need_each_other(fits, breaks, message):
    ModelParallelConfig(**fits)
    with pytest.raises(ConfigError, match=message) as refusal:
        ModelParallelConfig(**fits | breaks)
    assert str(refusal.value).count("\n") == 0


def test_settings_that_need_nothing_else():
    ModelParallelConfig(wgrad_deferral_limit=-1)
    ModelParallelConfig(expert_model_parallel_size=2)
    ModelParallelConfig(**TP)
    config = ModelParallelConfig(**TP, **PP, params_dtype=torch.float16)
    assert (config.expert_tensor_parallel_size, config.microbatch_group_size_per_vp_stage) == (2, 2)
    assert config.autocast_dtype is torch.float16
    own = ModelParallelConfig(
        expert_tensor_parallel_size=1,
        microbatch_group_size_per_vp_stage=5,
        autocast_dtype=torch.bfloat16,
        **TP,
    )
    assert (own.expert_tensor_parallel_size, own.microbatch_group_size_per_vp_stage) == (1, 5)
    assert own.autocast_dtype is torch.bfloat16
    # Options that the original does not have are off.
    assert (config.tp_comm_chunks, config.tp_comm_fused_matmul, config.pipeline_schedule) == (1, False, None)


def test_batches_come_again_after_a_rewind():
    batches = RerunDataIterator(range(10))
    assert next(batches) == 0
    batches.saved_microbatches = [1, 2]
    batches.rewind()
    state = batches.state_dict()
    assert state == {"saved_microbatches": [1, 2], "replaying": True, "replay_pos": 0}
    assert [next(batches) for _ in range(3)] == [1, 2, 1]  # the last one from the source, which stood at 1
    assert not batches.replaying
    batches.load_state_dict(state)
    assert [next(batches) for _ in range(2)] == [1, 2]
    batches.advance()
    assert batches.state_dict() == {"saved_microbatches": [], "replaying": False, "replay_pos": 0}
    assert next(batches) == 2


def test_faults_on_purpose():
    injector = RerunErrorInjector(0, RerunDiagnostic.PERSISTENT_ERROR)
    assert injector.maybe_inject() is False
    assert injector.maybe_miscompare(lambda a, b: a - b, 5, 3, None) == 2
    state = injector.state_dict()
    assert state == {"error_injection_rate": 0, "error_injection_type": "persistent_error"}
    other = RerunErrorInjector()
    assert (other.error_injection_rate, other.error_injection_type) == (0, RerunDiagnostic.TRANSIENT_ERROR)
    other.load_state_dict(state)
    assert other.error_injection_type is RerunDiagnostic.PERSISTENT_ERROR
    with pytest.raises(NotBuiltYetError):
        RerunErrorInjector(5)


def first_and_last_ranks():
    parallel_state.initialize_model_parallel(2, 2, create_gloo_process_groups=False)
    return (
        parallel_state.get_model_parallel_src_rank(),
        parallel_state.get_tensor_model_parallel_src_rank(),
        parallel_state.get_data_parallel_src_rank(),
        parallel_state.get_pipeline_model_parallel_first_rank(),
        parallel_state.get_pipeline_model_parallel_last_rank(),
        parallel_state.is_rank_in_embedding_group(ignore_virtual=True),
        parallel_state.is_rank_in_embedding_group(),
    )


def test_first_and_last_ranks_of_groups():
    """8 ranks: tensor-parallel pairs, two data-parallel copies, two stages of four ranks."""
    found = run_ranks(8, first_and_last_ranks)
    for rank, (model, tensor, data, first, last, *embedding) in enumerate(found):
        assert tensor == rank // 2 * 2
        assert data == rank // 4 * 4 + rank % 2
        assert (first, last) == (rank % 4, rank % 4 + 4)
        assert model == rank % 4 // 2 * 2
        assert embedding == [True, True]


@pytest.mark.parametrize(
    ("stages", "split", "before", "after", "at"),
    [(1, 0, [True], [True], [True]), (3, None, [True] * 3, [True] * 3, [True] * 3),
     (4, 2, [True, True, False, False], [False, False, True, True], [False, True, False, False])],
)  # fmt: skip
def test_stages_around_a_split(stages, split, before, after, at, monkeypatch):
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: stages)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_split_rank", lambda: split)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_decoder_start", lambda: split)
    for stage in range(stages):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda stage=stage: stage)
        assert parallel_state.is_pipeline_stage_before_split() == before[stage]
        assert parallel_state.is_pipeline_stage_after_split() == after[stage]
        assert parallel_state.is_pipeline_stage_at_split() == at[stage]
        assert parallel_state.is_inside_encoder() == before[stage]
        assert parallel_state.is_inside_decoder() == after[stage]
        assert parallel_state.is_inside_encoder(stage) == before[stage]
