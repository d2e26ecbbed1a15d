"""Figures of experts over micro-batches, layers, ranks and stages."""

import math
from typing import Any

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    save_to_aux_losses_tracker,
    track_moe_metrics,
)
from megatron.core.transformer.moe.tracker import Load, moe_layer_count, save_load, take_loads
from tests.distributed.pool import run_ranks
from tests.unit_tests.transformer.moe.routers import HIDDEN, drawn, router_of, tracked


class Writer:
    """A TensorBoard or W&B writer that keeps its points: tag -> (iteration, value)."""

    def __init__(self) -> None:
        self.points: dict[str, tuple[int, float]] = {}

    def add_scalar(self, tag: str, value: Any, iteration: int) -> None:
        self.points[tag] = (iteration, float(value))

    def log(self, values: dict[str, float], iteration: int) -> None:
        self.points |= {tag: (iteration, value) for tag, value in values.items()}


def save(name: str, loss: float, layer: int | None, layers: int = 4) -> None:
    save_to_aux_losses_tracker(name, torch.tensor(loss), layer, layers)


@pytest.mark.parametrize("per_layer", [False, True])
def test_means_over_micro_batches_and_layers_with_experts(per_layer: bool) -> None:
    for loss in (1.0, 3.0):  # two micro-batches
        save("balance", loss, 2)
        save("balance", 2.0 * loss, 4)
        save("z", 8.0, 4)
    save("balance", 100.0, None)
    writer, wandb = Writer(), Writer()
    totals: dict[str, Any] = {"lm loss": 5.0, "balance": 10.0}
    pattern = [0, 1, 0, 1]
    track_moe_metrics(0.5, 7, writer, wandb, totals, per_layer, num_layers=4, moe_layer_freq=pattern)
    # Means over micro-batches are 2 and 4, and over both layers 3.
    assert {name: float(value) for name, value in totals.items()} == {
        "lm loss": 5.0,
        "balance": 13.0,
        "z": 4.0,
    }
    wanted = {"balance": 3.0, "z": 4.0}
    if per_layer:
        wanted |= {f"moe/balance_layer_{layer}": loss for layer, loss in enumerate([0.0, 2.0, 0.0, 4.0])}
        wanted |= {f"moe/z_layer_{layer}": loss for layer, loss in enumerate([0.0, 0.0, 0.0, 8.0])}
    assert writer.points == wandb.points == {tag: (7, value) for tag, value in wanted.items()}
    assert tracked("balance") == 0.0


def test_only_named_losses_are_reported_and_made_where_none_was_saved() -> None:
    save("balance", 1.0, 1)
    totals: dict[str, Any] = {}
    track_moe_metrics(1.0, 1, None, None, totals, force_initialize=True, track_names="z", num_layers=4)
    assert {name: float(value) for name, value in totals.items()} == {"z": 0.0}
    save("balance", 1.0, 1)
    assert tracked("balance") == 1.0  # all begin anew
    clear_aux_losses_tracker()
    assert tracked("balance") == 0.0


def test_a_saved_loss_keeps_no_graph() -> None:
    loss = torch.ones((), requires_grad=True)
    save_to_aux_losses_tracker("balance", 2.0 * loss, 1, 2)
    values = parallel_state.get_moe_layer_wise_logging_tracker()["balance"]["values"]
    assert not values.requires_grad


@pytest.mark.parametrize(
    ("frequency", "count"), [(None, 5), (1, 5), (2, 3), ([0, 1, 1, 0, 1], 3), ([0] * 5, 0)]
)
def test_number_of_layers_with_experts(frequency: Any, count: int) -> None:
    assert moe_layer_count(5, frequency) == count


def _losses_and_loads_of_stages() -> tuple[dict[str, float], list[Load]]:
    """Stage 0 has no experts; layer 2 is on stage 1. Each rank reports its own number."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    data = parallel_state.get_data_parallel_rank()
    if parallel_state.is_pipeline_last_stage():
        group = parallel_state.get_tensor_and_context_parallel_group()
        replicas = parallel_state.get_data_parallel_group()
        loss = torch.tensor(1.0 + data)
        save_to_aux_losses_tracker("balance", loss, 2, 2, reduce_group=group, avg_group=replicas)
        counts = torch.tensor([2**24 + 1 - data, data, 0])
        save_load(2, 2, counts, counts - torch.tensor([1, 0, 0]), torch.full((4, 3), 1.0 / 3.0))
    totals: dict[str, Any] = {}
    track_moe_metrics(
        1.0, 1, None, None, totals, force_initialize=True, track_names="balance", num_layers=2,
        moe_layer_freq=[0, 1],
    )  # fmt: skip
    return {name: float(value) for name, value in totals.items()}, take_loads(2, 3)


def test_stages_without_experts_know_the_figures_of_those_with_them() -> None:
    for losses, loads in run_ranks(4, _losses_and_loads_of_stages):
        assert losses == {"balance": 1.5}  # the mean over two replicas
        (load,) = loads
        # Odd numbers above 2**24, which float32 does not have.
        assert (load.layer, load.tokens, load.dropped) == (2, [2**25 - 1, 1, 0], 2)
        assert load.entropy == pytest.approx(math.log(3.0))
        assert load.starving == [2]


@pytest.mark.parametrize("fields", [{}, {"moe_expert_capacity_factor": 0.5}, "padded"])
def test_loads_of_a_router(fields: Any) -> None:
    capped = fields != {}
    if fields == "padded":
        fields = {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True}
    router = router_of(8, 2, num_layers=3, log_moe_balance=True, **fields)
    router.set_layer_number(2)
    tokens, chosen, entropies = 32, torch.zeros(8, dtype=torch.int64), []
    kept = torch.zeros_like(chosen)
    for number in range(2):
        hidden = drawn(tokens, 1, HIDDEN, seed=number).float()
        logits = (hidden.view(-1, HIDDEN) @ router.weight.t()).detach().double()
        counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=8)
        chosen += counts
        kept += counts.clamp(max=4) if capped else counts  # 32 * 2 / 8 * 0.5
        entropies += [-float((p * p.log()).sum()) for p in logits.softmax(-1)]
        router(hidden)
        with torch.no_grad():
            router(hidden)
        router.eval()(hidden)
        router.train()
    (load,) = take_loads(3, 8)
    assert load.layer == 2
    assert load.tokens == kept.tolist()
    assert load.dropped == int((chosen - kept).sum())
    assert load.entropy == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert load.largest_over_mean == pytest.approx(float(kept.max() / kept.double().mean()))
    assert take_loads(3, 8) == []


def test_figures_of_a_load() -> None:
    load = Load(3, [6, 0, 2, 0], 1, 0.5)
    assert load.largest_over_mean == 3.0
    assert load.starving == [1, 3]
    assert Load(3, [0, 0], 0, 0.0).largest_over_mean == 1.0


def test_loads_are_not_counted_unless_asked_for() -> None:
    router = router_of(8, 2)
    router(drawn(4, 1, HIDDEN).float())
    assert take_loads(1, 8) == []
