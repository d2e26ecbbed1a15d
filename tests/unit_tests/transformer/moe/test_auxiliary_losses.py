"""Values and gradients of the losses of routers against their formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    sequence_load_balancing_loss_func,
    switch_load_balancing_loss_func,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter, tracked_losses
from tests.reference_models import load_transformers
from tests.unit_tests.transformer.moe.routers import (
    HIDDEN,
    balance_loss,
    config_of,
    drawn,
    normalised_scores,
    router_of,
    sequence_balance_loss,
    tracked,
)

SEQUENCE, BATCH = 10, 3
TOKENS = SEQUENCE * BATCH
# Experts of a layer, and of a token.
SIZES = [(8, 1), (8, 2), (64, 6), (256, 8)]
BALANCE = "load_balancing_loss"
SIGMOID: dict[str, Any] = dict(moe_router_score_function="sigmoid")
Formula = Callable[[Tensor, Tensor], Tensor]


def check_losses(router: TopKRouter, formulas: dict[str, tuple[float, Formula]]) -> None:
    """What the router reports, and the gradient of its weight, are those of losses.

    Args:
        router: of a training model; its weights in the output have no gradient here.
        formulas: name of a loss -> its coefficient and its value, given [T, E] fp64 logits and the bool map.
    """
    hidden = drawn(SEQUENCE, BATCH, HIDDEN, seed=3).float()
    scale = 3.0
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale))
    probs, routing_map = router(hidden)
    (probs * 0.0).sum().backward()

    weight = router.weight.detach().double().requires_grad_()
    logits = hidden.double().view(TOKENS, HIDDEN) @ weight.t()
    total = torch.zeros((), dtype=torch.float64)
    assert set(tracked_losses(router.config)) == set(formulas)
    for name, (coefficient, formula) in formulas.items():
        value = formula(logits, routing_map)
        assert tracked(name) == pytest.approx(value.item(), rel=1e-5)
        total = total + scale * coefficient * value
    found = torch.zeros_like(weight) if router.weight.grad is None else router.weight.grad.double()
    if not formulas:
        assert not found.any()
        return
    total.backward()
    assert weight.grad is not None and weight.grad.abs().max() > 1e-6
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-5 * float(weight.grad.abs().max()))


@pytest.mark.parametrize(("experts", "topk"), SIZES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_aux_loss_is_over_the_micro_batch(experts: int, topk: int, score: str) -> None:
    def formula(logits: Tensor, chosen: Tensor) -> Tensor:
        return balance_loss(normalised_scores(logits, score), chosen, topk)

    router = router_of(experts, topk, moe_aux_loss_coeff=0.02, moe_router_score_function=score)
    check_losses(router, {BALANCE: (0.02, formula)})


@pytest.mark.parametrize(("experts", "topk"), SIZES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "kind",
    [
        {"moe_router_load_balancing_type": "seq_aux_loss"},
        {"moe_router_load_balancing_type": "none", "seq_aux": True},
    ],
    ids=["seq_aux_loss", "none with seq_aux"],
)
def test_sequence_loss_is_the_mean_over_sequences(experts: int, topk: int, score: str, kind: dict) -> None:
    def formula(logits: Tensor, chosen: Tensor) -> Tensor:
        return sequence_balance_loss(normalised_scores(logits, score), chosen, topk, BATCH)

    router = router_of(experts, topk, moe_aux_loss_coeff=0.02, moe_router_score_function=score, **kind)
    check_losses(router, {BALANCE: (0.02, formula)})


@pytest.mark.parametrize("kind", [{"moe_router_load_balancing_type": "none", "seq_aux": True}, {}])
def test_scores_of_the_loss_are_without_the_bias(kind: dict) -> None:
    """The bias changes what is chosen, and the loss through that alone."""

    def formula(logits: Tensor, chosen: Tensor) -> Tensor:
        scores = normalised_scores(logits, "sigmoid")
        if kind:
            return sequence_balance_loss(scores, chosen, 2, BATCH)
        return balance_loss(scores, chosen, 2)

    fields: dict[str, Any] = dict(
        moe_aux_loss_coeff=0.02, moe_router_enable_expert_bias=True, **SIGMOID, **kind
    )
    check_losses(router_of(8, 2, **fields), {BALANCE: (0.02, formula)})


def test_pai_megatron_aux_loss_takes_softmax_scores_whatever_the_score_function() -> None:
    def formula(logits: Tensor, chosen: Tensor) -> Tensor:
        return balance_loss(normalised_scores(logits), chosen, 2)

    kind: dict[str, Any] = dict(moe_router_load_balancing_type="pai_megatron_aux_loss", **SIGMOID)
    check_losses(router_of(8, 2, moe_aux_loss_coeff=0.02, **kind), {BALANCE: (0.02, formula)})


@pytest.mark.parametrize("kind", ["none", "softmax_topk"])
def test_kinds_without_a_loss_take_no_coefficient(kind: str) -> None:
    check_losses(router_of(8, 2, moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.02), {})


@pytest.mark.parametrize("kind", ["aux_loss", "none", "sinkhorn", "softmax_topk"])
def test_z_loss_is_the_mean_square_of_the_log_of_sums(kind: str) -> None:
    def formula(logits: Tensor, chosen: Tensor) -> Tensor:
        return logits.exp().sum(-1).log().square().mean()

    router = router_of(8, 2, moe_router_load_balancing_type=kind, moe_z_loss_coeff=0.001)
    check_losses(router, {"z_loss": (0.001, formula)})


def group_limited_losses(
    sequences: int, topk: int, groups: int, kept: int
) -> tuple[Formula, Formula, Formula]:
    """The losses on experts, groups and traffic, for each sequence by itself, and their means."""

    def mean(of_one: Formula) -> Formula:
        def over_sequences(logits: Tensor, chosen: Tensor) -> Tensor:
            scores = normalised_scores(logits)
            parts = [of_one(scores[b::sequences], chosen[b::sequences]) for b in range(sequences)]
            return torch.stack(parts).mean()

        return over_sequences

    def expert(scores: Tensor, chosen: Tensor) -> Tensor:
        return balance_loss(scores, chosen, topk)

    def device(scores: Tensor, chosen: Tensor) -> Tensor:
        tokens, experts = scores.shape
        frequencies = chosen.double().sum(0) * experts / (topk * tokens)
        size, total = experts // groups, torch.zeros((), dtype=torch.float64)
        for first in range(0, experts, size):
            own = slice(first, first + size)
            total = total + frequencies[own].mean() * scores[:, own].mean(0).sum()
        return total

    def communication(scores: Tensor, chosen: Tensor) -> Tensor:
        tokens, experts = scores.shape
        size, total = experts // groups, torch.zeros((), dtype=torch.float64)
        for first in range(0, experts, size):
            own = slice(first, first + size)
            users = sum(1 for token in chosen if bool(token[own].any()))
            total = total + users * groups / (kept * tokens) * scores[:, own].mean(0).sum()
        return total

    return mean(expert), mean(device), mean(communication)


@pytest.mark.parametrize(
    ("experts", "topk", "groups", "kept"), [(8, 1, 4, 2), (8, 2, 4, 2), (64, 6, 8, 3), (160, 6, 8, 3)]
)
@pytest.mark.parametrize("seq_aux", [True, False])
def test_group_limited_greedy_has_losses_on_three_levels(
    experts: int, topk: int, groups: int, kept: int, seq_aux: bool
) -> None:
    levels = [f"load_balancing_{level}_level_loss" for level in ("expert", "device", "comm")]
    coefficients = (0.003, 0.05, 0.02)
    formulas = group_limited_losses(BATCH if seq_aux else 1, topk, groups, kept)
    router = router_of(
        experts,
        topk,
        moe_router_load_balancing_type="group_limited_greedy",
        moe_router_num_groups=groups,
        moe_router_group_topk=kept,
        moe_router_topk_scaling_factor=16.0,
        moe_aux_loss_coeff=coefficients[0],
        moe_device_level_aux_loss_coeff=coefficients[1],
        moe_comm_aux_loss_coeff=coefficients[2],
        seq_aux=seq_aux,
    )
    check_losses(router, dict(zip(levels, zip(coefficients, formulas, strict=True), strict=True)))


def test_a_level_without_coefficient_is_neither_computed_nor_logged() -> None:
    _, device, _ = group_limited_losses(1, 2, 4, 2)
    router = router_of(
        8,
        2,
        moe_router_load_balancing_type="group_limited_greedy",
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_device_level_aux_loss_coeff=0.05,
    )
    check_losses(router, {"load_balancing_device_level_loss": (0.05, device)})


@pytest.mark.parametrize("topk", [1, 2])
def test_aux_loss_is_that_of_mixtral(topk: int) -> None:
    load_transformers()
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    router = router_of(8, topk, moe_aux_loss_coeff=1.0)
    hidden = drawn(SEQUENCE, BATCH, HIDDEN).float()
    router(hidden)
    logits = hidden.view(TOKENS, HIDDEN) @ router.weight.t()
    theirs = torch.as_tensor(load_balancing_loss_func((logits,), 8, topk))
    # Theirs counts k tokens for each.
    assert tracked(BALANCE) == pytest.approx(theirs.item() / topk)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_losses_count_tokens_before_they_are_dropped(kind: str) -> None:
    """Else an expert that is full would look no worse for more tokens, and padding would hide any load."""
    fields: dict[str, Any] = dict(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=0.02)
    hidden = drawn(SEQUENCE, BATCH, HIDDEN).float()
    router_of(8, 2, **fields)(hidden)
    wanted = tracked(BALANCE)
    for padded in (False, True):
        capped = router_of(
            8, 2, moe_expert_capacity_factor=0.5, moe_pad_expert_input_to_capacity=padded, **fields
        )
        before = tracked(BALANCE)
        _, routing_map = capped(hidden)
        assert routing_map.sum(0).max() == 4  # ceil(30 * 2 / 8 * 0.5)
        assert tracked(BALANCE) - before == pytest.approx(wanted)


@pytest.mark.parametrize("function", ["aux_loss", "seq_aux_loss"])
def test_loss_of_an_even_load_is_its_coefficient(function: str) -> None:
    """With even scores the formulas come to 1 for any numbers of tokens, experts and choices."""
    for experts, topk in [(8, 1), (8, 2), (64, 6), (128, 8)]:
        tokens = experts * 2
        scores = torch.full((tokens, experts), 1.0 / experts)
        turn = (torch.arange(tokens * topk) % experts).view(tokens, topk)
        chosen = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, turn, True)
        if function == "aux_loss":
            loss = switch_load_balancing_loss_func(scores, chosen.sum(0), topk, 0.01)
        else:
            loss = sequence_load_balancing_loss_func(scores, chosen, 2, experts, topk, 0.01)
        assert float(loss) == pytest.approx(0.01)


def test_z_loss_of_large_logits_does_not_overflow() -> None:
    logits = torch.tensor([[1000.0, 999.0], [-1000.0, -1000.0]])
    wide = torch.tensor(
        [1000.0 + torch.log1p(torch.tensor(-1.0).exp()), -1000.0 + torch.log(torch.tensor(2.0))]
    )
    assert float(z_loss_func(logits, 0.1)) == pytest.approx(0.1 * float(wide.square().mean()))


@pytest.mark.parametrize("mode", ["evaluation", "without gradients"])
def test_no_loss_outside_training(mode: str) -> None:
    router = router_of(8, 2, moe_aux_loss_coeff=0.02, moe_z_loss_coeff=0.1)
    hidden = drawn(SEQUENCE, BATCH, HIDDEN).float()
    if mode == "evaluation":
        router.eval()(hidden)
    else:
        with torch.no_grad():
            router(hidden)
    with pytest.raises(KeyError):
        tracked(BALANCE)


def test_per_token_losses_count_once_for_each_token_of_the_micro_batch() -> None:
    fields: dict[str, Any] = dict(moe_aux_loss_coeff=0.02, moe_z_loss_coeff=0.01)
    hidden = drawn(SEQUENCE, BATCH, HIDDEN).float()
    gradients, values = [], []
    for per_token in (False, True):
        router = router_of(8, 2, calculate_per_token_loss=per_token, **fields)
        before = tracked(BALANCE) if values else 0.0
        probs, _ = router(hidden)
        (probs * 0.0).sum().backward()
        gradients.append(router.weight.grad)
        values.append(tracked(BALANCE) - before)
    torch.testing.assert_close(gradients[1], gradients[0] * TOKENS)
    assert values[1] == pytest.approx(values[0])  # logged as before


def test_sinkhorn_refuses_a_loss() -> None:
    config = config_of(8, 2, moe_router_load_balancing_type="sinkhorn")
    router = TopKRouter(config)
    config.moe_aux_loss_coeff = 0.1
    with pytest.raises(ConfigError, match="sinkhorn routing is even by itself; set it to 0"):
        router(drawn(SEQUENCE, BATCH, HIDDEN).float())
