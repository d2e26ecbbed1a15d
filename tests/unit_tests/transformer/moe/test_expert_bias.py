"""How the bias of experts follows their loads: over ranks, micro-batches, evaluations and recomputation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import build_module
from tests.distributed.pool import run_ranks
from tests.unit_tests.transformer.moe.routers import HIDDEN, config_of, drawn, router_of

RATE = 0.01
BIASED: dict[str, Any] = dict(
    moe_router_load_balancing_type="none",
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_bias_update_rate=RATE,
)


def moved(loads: list[int], bias: list[float]) -> list[float]:
    """One step of the rate towards the mean load."""
    mean = sum(loads) / len(loads)
    return [b + RATE * ((load < mean) - (load > mean)) for load, b in zip(loads, bias, strict=True)]


def loads_of(router: TopKRouter) -> list[int]:
    assert router.local_tokens_per_expert is not None
    return [int(count) for count in router.local_tokens_per_expert]


def bias_of(router: TopKRouter) -> list[float]:
    assert router.expert_bias is not None
    return router.expert_bias.tolist()


def chosen_by_hand(router: TopKRouter, hidden: Tensor) -> list[int]:
    """Tokens of each expert: those whose sigmoid plus bias is among the largest."""
    assert router.expert_bias is not None
    scores = (hidden.view(-1, HIDDEN) @ router.weight.t()).sigmoid() + router.expert_bias
    best = scores.topk(router.topk).indices
    return torch.bincount(best.flatten(), minlength=router.num_experts).tolist()


@pytest.mark.parametrize("experts", [8, 64, 256])
def test_the_bias_moves_by_the_rate_towards_the_mean_load(experts: int) -> None:
    loads = [(7 * expert) % 11 for expert in range(experts)]
    bias = drawn(experts).float()
    found = get_updated_expert_bias(torch.tensor(loads).float(), bias, RATE)
    assert found.tolist() == pytest.approx(moved(loads, bias.tolist()), abs=1e-6)
    even = get_updated_expert_bias(torch.full((experts,), 5.0), bias, RATE)
    assert torch.equal(even, bias)


@pytest.mark.parametrize("capacity", [{}, {"moe_expert_capacity_factor": 0.5}, "padded"])
def test_loads_count_all_tokens_that_chose_an_expert(capacity: Any) -> None:
    if capacity == "padded":
        capacity = {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True}
    router = router_of(8, 2, **BIASED, **capacity)
    wanted = [0] * 8
    for number in range(3):
        hidden = drawn(16, 2, HIDDEN, seed=number).float()
        wanted = [a + b for a, b in zip(wanted, chosen_by_hand(router, hidden), strict=True)]
        router(hidden)
    assert loads_of(router) == wanted


def test_loads_are_not_counted_in_evaluation() -> None:
    router = router_of(8, 2, **BIASED)
    hidden = drawn(16, 2, HIDDEN).float()
    with torch.no_grad():
        router(hidden)
    router.eval()(hidden)
    assert loads_of(router) == [0] * 8


@pytest.mark.parametrize(
    "recompute",
    [
        {},
        {"moe_layer_recompute": True},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ],
    ids=["nothing", "moe_layer_recompute", "recompute_modules moe"],
)
def test_a_recomputed_layer_counts_once(recompute: dict) -> None:
    model_parallel_cuda_manual_seed(1)
    config = config_of(8, 2, perform_initialization=True, init_method_std=0.5, **BIASED, **recompute)
    layer = build_module(get_moe_module_spec(use_te=False, num_experts=8), config=config)
    hidden = drawn(16, 2, HIDDEN).float().requires_grad_()
    wanted = chosen_by_hand(layer.router, hidden)
    output, _ = layer(hidden)
    output.sum().backward()
    assert sum(wanted) == 64
    assert loads_of(layer.router) == wanted


def _hidden(rank: int) -> Tensor:
    return drawn(8, 2, HIDDEN, seed=200 + rank).float()


def _loads_and_biases(sizes: dict[str, int], seen: list[int]) -> list[tuple[list[int], list[float]]]:
    """Two steps on this rank with the tokens of ``seen[rank]``: after each its own loads, and the bias."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.get("tp", 1),
        pipeline_model_parallel_size=sizes.get("pp", 1),
        context_parallel_size=sizes.get("cp", 1),
    )
    stage = MegatronModule(config_of(8, 2, **BIASED))
    has_experts = parallel_state.is_pipeline_last_stage()
    routers = [router_of(8, 2, **BIASED) for _ in range(2)] if has_experts else []
    stage.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), *routers])
    model = DistributedDataParallel(stage.config, DistributedDataParallelConfig(), stage)
    results = []
    for _ in range(2):
        model.zero_grad_buffer()
        loads = [0] * 8
        for router in routers:
            probs, _ = router(_hidden(seen[torch.distributed.get_rank()]))
            probs.sum().backward()
            loads = loads_of(router)
        finalize_model_grads([model])
        assert all(loads_of(router) == [0] * 8 for router in routers)
        biases = [bias_of(router) for router in routers]
        assert biases[:1] == biases[1:]
        results.append((loads, biases[0] if biases else []))
    return results


@pytest.mark.parametrize(
    "sizes", [{}, {"tp": 2}, {"cp": 2}, {"tp": 2, "cp": 2}, {"pp": 2}], ids=lambda s: str(s) if s else "data"
)
def test_the_bias_follows_the_loads_of_all_ranks(sizes: dict[str, int]) -> None:
    results = run_ranks(4, _loads_and_biases, sizes, list(range(4)))
    reference = router_of(8, 2, **BIASED)
    with_experts = [rank for rank, steps in enumerate(results) if steps[0][1]]
    assert len(with_experts) == (2 if "pp" in sizes else 4)
    bias = bias_of(reference)
    for step in range(2):
        assert reference.expert_bias is not None
        reference.expert_bias.copy_(torch.tensor(bias))
        parts = {rank: chosen_by_hand(reference, _hidden(rank)) for rank in with_experts}
        bias = moved([sum(column) for column in zip(*parts.values(), strict=True)], bias)
        for rank in with_experts:
            loads, found = results[rank][step]
            assert loads == parts[rank], (rank, step)
            assert found == pytest.approx(bias, abs=1e-6), (rank, step)


def test_loads_become_even_in_the_course_of_steps() -> None:
    router = router_of(8, 2, **{**BIASED, "moe_router_bias_update_rate": 0.005})
    with torch.no_grad():
        router.weight.mul_(0.1)  # far from where sigmoids are flat
    model = DistributedDataParallel(router.config, DistributedDataParallelConfig(), router)
    hidden = drawn(64, 4, HIDDEN).float() + 0.5
    largest = []
    for _ in range(60):
        probs, routing_map = model(hidden)
        (0.0 * probs).sum().backward()
        finalize_model_grads([model])
        loads = routing_map.sum(0).double()
        largest.append(float(loads.max() / loads.mean()))
    assert largest[0] > 1.5
    assert max(largest[-5:]) < 1.15
