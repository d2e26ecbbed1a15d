"""Experts in the chain of optimizers: reduced over ranks of their own, stepped with the dense rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.optimizer import DistributedOptimizer
from tests.distributed.pool import run_ranks
from tests.unit_tests.distributed.small_training import PRECISIONS, Net, Training, make_config

SHARDED = {"use_distributed_optimizer": True}


class WithExperts(Net):
    """Every rank has an expert of its own: the first layer."""

    def __init__(self) -> None:
        super().__init__(make_config())
        for param in self.layers[0].parameters():
            param.allreduce = False


def expert_step(ddp: dict[str, Any]) -> dict[str, Any]:
    """2 expert-parallel x 2 expert-data-parallel ranks; gradients are the rank's number plus one."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    training = Training(ddp, settings={"clip_grad": 0.0}, module=WithExperts())
    for param in training.module.parameters():
        param.main_grad.fill_(dist.get_rank() + 1.0)
    training.model.finish_grad_sync()
    gradients = {name: gradient.unique().tolist() for name, gradient in expert_gradients(training).items()}
    _, norm, _ = training.optimizer.step()
    return {
        "expert rank": parallel_state.get_expert_model_parallel_rank(),
        "gradients": gradients,
        "norm": norm,
        "members": len(training.optimizer.chained_optimizers),
        "state": isinstance(training.optimizer.state_dict(), list),
    }


def expert_gradients(training: Training) -> dict[str, torch.Tensor]:
    """This rank's valid gradients."""
    if not training.model.ddp_config.use_distributed_optimizer:
        return {name: param.main_grad for name, param in training.module.named_parameters()}
    found = {}
    for member in training.optimizer.chained_optimizers:
        for shards, buffer in zip(member.shards, member.buffers, strict=True):
            for shard in shards:
                found |= {buffer.param_to_name[p]: shard.part(shard.grad_data, p) for p in shard.ranges}
    return found


@pytest.mark.parametrize("ddp", [{}, {"average_in_collective": True}, SHARDED])
def test_experts_are_reduced_over_their_own_ranks(ddp: dict[str, Any]) -> None:
    answers = run_ranks(4, expert_step, ddp)
    dense = (1.0 + 2.0 + 3.0 + 4.0) / 4
    # Ranks 0 and 2 hold one expert, 1 and 3 the other; the mean is over all four.
    of_expert = {0: (1.0 + 3.0) / 4, 1: (2.0 + 4.0) / 4}
    sizes = {name: param.numel() for name, param in WithExperts().named_parameters()}
    squares = sum(size * dense**2 for name, size in sizes.items() if not name.startswith("layers.0"))
    for value in of_expert.values():
        squares += sum(size * value**2 for name, size in sizes.items() if name.startswith("layers.0"))
    for answer in answers:
        for name, values in answer["gradients"].items():
            expert = name.startswith("layers.0")
            assert values == [of_expert[answer["expert rank"]] if expert else dense], name
        assert answer["norm"] == pytest.approx(squares**0.5, rel=1e-6)
        assert (answer["members"], answer["state"]) == (2, True)


def step_of_a_stage(ddp: dict[str, Any], precision: str) -> tuple[Any, int]:
    """2 stages x 2 expert-parallel ranks, experts on the second stage only; gradients as above."""
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=2, expert_model_parallel_size=2, distributed_timeout_minutes=1
    )
    module = Net(make_config()) if parallel_state.is_pipeline_first_stage() else WithExperts()
    settings = {"clip_grad": 1.0, "log_num_zeros_in_grad": True, "initial_loss_scale": 1.0}
    training = Training(ddp, settings={**PRECISIONS[precision], **settings}, module=module)
    for param in training.module.parameters():
        param.main_grad.fill_(dist.get_rank() + 1.0)
    training.model.finish_grad_sync()
    result = training.optimizer.step()
    training.optimizer.load_state_dict(training.optimizer.state_dict())
    if ddp:
        training.optimizer.load_parameter_state_from_dp_zero(training.optimizer.get_parameter_state_dp_zero())
    return result, len(training.optimizer.param_groups)


@pytest.mark.parametrize("ddp", [{}, SHARDED])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_stages_without_experts_step_with_those_that_have_some(ddp: dict[str, Any], precision: str) -> None:
    """Overflow, norm and zeros are found together: every stage must take part in each of the messages."""
    answers = run_ranks(4, step_of_a_stage, ddp, precision)
    sizes = {name: param.numel() for name, param in WithExperts().named_parameters()}
    experts = sum(size for name, size in sizes.items() if name.startswith("layers.0"))
    everything = sum(sizes.values())
    # Means over the two ranks of a stage, of which each holds another expert.
    squares = everything * 1.5**2 + (everything - experts) * 3.5**2 + experts * (1.5**2 + 2.0**2)
    for (succeeded, norm, zeros), _ in answers:
        assert succeeded and zeros == 0.0
        assert norm == pytest.approx(squares**0.5, rel=1e-6)


def expert_state(directory: str) -> tuple[list[bool], bool]:
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    training = Training(SHARDED, module=WithExperts())
    training.step(0)
    file = f"{directory}/{parallel_state.get_expert_model_parallel_rank()}.pt"
    training.optimizer.save_parameter_state(file)
    dist.barrier()
    states = torch.load(file, weights_only=True)
    moments = [moment.clone() for moment in first_moments(training)]
    training.step(1)
    training.optimizer.load_parameter_state(file)
    assert isinstance(training.optimizer.chained_optimizers[1], DistributedOptimizer)
    return [state is None for state in states], all(map(torch.equal, moments, first_moments(training)))


def first_moments(training: Training) -> list[torch.Tensor]:
    members = training.optimizer.chained_optimizers
    return [m.optimizer.state[param]["exp_avg"] for m in members for param in m.get_parameters()]


def test_state_of_experts_is_a_list_per_file(tmp_path: Path) -> None:
    answers = run_ranks(4, expert_state, str(tmp_path))
    # Rank 0 collects both parts; rank 1 is the first of its expert's ranks only.
    assert answers == [([False, False], True), ([True, False], True)] * 2
