"""Sums over parts of the model that hold the same parameter, and over tokens."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.timers import Timers
from megatron.core.transformer.module import MegatronModule
from tests.distributed.pool import run_ranks
from tests.unit_tests.distributed.small_training import make_config


class Part(MegatronModule):
    """A stage's share of a model: a norm, a norm of heads, a linear layer, and perhaps a tied embedding."""

    def __init__(self, config: Any, pre_process: bool, post_process: bool) -> None:
        super().__init__(config)
        self.share_embeddings_and_output_weights = True
        self.pre_process, self.post_process = pre_process, post_process
        self.q_layernorm = torch.nn.Parameter(torch.ones(3))
        self.norm = torch.nn.Parameter(torch.ones(5))
        self.norm.sequence_parallel = config.sequence_parallel
        self.linear = torch.nn.Parameter(torch.ones(7))
        if pre_process or post_process:
            self.tied = torch.nn.Parameter(torch.ones(300))
            self.tied.shared_embedding = True
        if pre_process:
            positions = SimpleNamespace(weight=torch.nn.Parameter(torch.ones(2)))
            self.register_parameter("positions", positions.weight)
            object.__setattr__(self, "embedding", SimpleNamespace(position_embeddings=positions))

    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter:
        return self.tied


def values(chunk: DistributedDataParallel) -> dict[str, list[float]]:
    """Distinct values of each valid gradient: in this rank's shard of it where it is sharded."""
    found = {}
    for buffer in chunk.buffers:
        group = buffer.data_parallel_group
        for param, (start, end, number) in buffer.param_index_map.items():
            bucket = buffer.buckets[number]
            low, high = start, end
            if chunk.ddp_config.use_distributed_optimizer:
                size = bucket.grad_data.numel() // group.size()
                low = max(start, bucket.offset + group.rank() * size)
                high = min(end, bucket.offset + (group.rank() + 1) * size)
            if low < high:
                found[buffer.param_to_name[param]] = buffer.grad_data[low:high].unique().tolist()
    return found


def tensor_parallel(sequence_parallel: bool, sharded: bool) -> dict[str, Any]:
    """2 tensor- x 2 data-parallel ranks; gradients are 1 or 2 by data rank, times 1 or 10 by tensor rank."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    config = make_config(qk_layernorm=True)
    config.sequence_parallel = sequence_parallel
    config.timers = Timers(1, "max")
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    chunk = DistributedDataParallel(config, ddp, Part(config, False, False))
    factor = 10.0 if parallel_state.get_tensor_model_parallel_rank() else 1.0
    for param in chunk.parameters():
        param.main_grad.fill_(factor * (parallel_state.get_data_parallel_rank() + 1.0))
    calls = count_all_reduces(parallel_state.get_tensor_model_parallel_group())
    finalize_model_grads([chunk])
    return {"values": values(chunk), "own": [1.5 * factor], "calls": calls}


def count_all_reduces(group: dist.ProcessGroup) -> list[int]:
    """Elements of all-reduces over ``group`` from now on, in this process (of a pool that forgets it)."""
    calls, original = [], dist.all_reduce

    def count(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is group:
            calls.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = count
    return calls


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_of_parts_of_a_sequence_are_summed_in_one_message(
    sequence_parallel: bool, sharded: bool
) -> None:
    """Those of parameters marked for it, and of norms of heads, which ranks share out in any case."""
    summed = {"norm": 5, "q_layernorm": 3} if sequence_parallel else {"q_layernorm": 3}
    for answer in run_ranks(4, tensor_parallel, sequence_parallel, sharded):
        for name, found in answer["values"].items():
            assert found == ([1.5 * 11.0] if name in summed else answer["own"]), name
        assert answer["calls"] == [sum(summed.values())]


def tied_embedding(sharded: bool, chunks: int) -> dict[str, Any]:
    """2 stages x 2 data-parallel ranks; every gradient is the number of the global rank plus one."""
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    config = make_config()
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=sharded, overlap_grad_reduce=True, bucket_size=10
    )
    model = []
    for number in range(chunks):
        part = Part(config, stage == 0 and number == 0, stage == 1 and number == chunks - 1)
        model.append(DistributedDataParallel(config, ddp, part, disable_bucketing=number > 0))
    for chunk in model:
        for param in chunk.parameters():
            param.main_grad.fill_(dist.get_rank() + 1.0)
        chunk.start_grad_sync()
    finalize_model_grads(model)
    holder = model[0] if stage == 0 else model[-1]
    (buffer,) = holder.buffers
    return {
        "stage": stage,
        "values": [values(chunk) for chunk in model],
        "cut": [
            (bucket.numel_unpadded, bucket.grad_data.numel())
            for bucket in buffer.buckets
            if holder.module.tied in bucket.params
        ],
        "buckets": [len(chunk.buffers[0].buckets) for chunk in model],
    }


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("sharded", [False, True])
def test_copies_of_a_tied_embedding_are_summed_over_their_stages(sharded: bool, chunks: int) -> None:
    answers = run_ranks(4, tied_embedding, sharded, chunks)
    means = {0: (1.0 + 2.0) / 2, 1: (3.0 + 4.0) / 2}
    for answer in answers:
        holder = 0 if answer["stage"] == 0 else chunks - 1
        for number, found in enumerate(answer["values"]):
            for name, value in found.items():
                tied = name == "tied" and number == holder
                assert value == [sum(means.values()) if tied else means[answer["stage"]]], name
    # Both copies are cut alike: a bucket of their own, where shards matter.
    if sharded:
        assert [answer["cut"] for answer in answers] == [[(300, 384)]] * 4
    # Buckets of 10 elements on the first stage's first chunk only; elsewhere one, and the tied copy's.
    #   plain: positions 2 + tied 300 | linear 7 + norm 5 | q_layernorm 3; sharded: positions | tied | ...
    for answer in answers:
        expected = [1] * chunks
        if answer["stage"] == 0:
            expected[0] = 4 if sharded else 3
        elif sharded:
            expected[-1] = 2
        assert answer["buckets"] == expected


def positions_on_two_stages() -> list[float]:
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2, get_position_embedding_ranks=list
    )
    config = make_config()
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), Part(config, True, False))
    for param in chunk.parameters():
        param.main_grad.fill_(dist.get_rank() + 1.0)
    finalize_model_grads([chunk])
    return [chunk.module.positions.main_grad[0].item(), chunk.module.norm.main_grad[0].item()]


def test_position_embeddings_are_summed_over_their_stages() -> None:
    assert run_ranks(2, positions_on_two_stages) == [[3.0, 1.0], [3.0, 2.0]]


def tokens(pipeline: int, context: int) -> tuple[float, int]:
    """Only the last stage knows its tokens: 3 and 5 on the two data-parallel ranks; gradients are 16."""
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=pipeline, context_parallel_size=context
    )
    config = make_config(calculate_per_token_loss=True)
    part = Part(config, False, False)
    part.share_embeddings_and_output_weights = False
    chunk = DistributedDataParallel(config, DistributedDataParallelConfig(), part)
    for param in chunk.parameters():
        param.main_grad.fill_(16.0)
    own = torch.zeros((), dtype=torch.int64)
    if parallel_state.is_pipeline_last_stage():
        own = torch.tensor(5 if parallel_state.get_data_parallel_rank() else 3)
    finalize_model_grads([chunk], own)
    return chunk.module.linear.main_grad[0].item(), parallel_state.get_data_parallel_world_size()


@pytest.mark.parametrize(("pipeline", "context"), [(1, 1), (2, 1), (1, 2)])
def test_tokens_are_those_of_all_data_ranks_as_the_last_stage_counts_them(
    pipeline: int, context: int
) -> None:
    """Gradients are sums over data and context ranks; context ranks have added up their tokens already."""
    ranks = 2 * pipeline * context
    for value, data_ranks in run_ranks(ranks, tokens, pipeline, context):
        assert data_ranks == 2
        assert value == 16.0 * 2 * context / 8
