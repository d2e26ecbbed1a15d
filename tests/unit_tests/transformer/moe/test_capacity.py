"""Which tokens an expert keeps when it has a capacity, against a loop over experts."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.moe_utils import (
    get_capacity,
    rows_per_expert,
    topk_softmax_with_capacity,
)
from tests.unit_tests.transformer.moe.routers import HIDDEN, drawn, router_of

TOKENS = 48
# Experts of a layer, and of a token.
SIZES = [(8, 1), (8, 2), (64, 6), (128, 8)]


def kept_by_loop(weights: Tensor, chosen: Tensor, capacity: int, policy: str) -> Tensor:
    """[t, E] bool: the largest weights, or the first tokens, of those that chose the expert."""
    kept = torch.zeros_like(chosen)
    for expert in range(chosen.shape[1]):
        tokens = [token for token in range(len(chosen)) if chosen[token, expert]]
        if policy == "probs":
            tokens.sort(key=lambda token: -float(weights[token, expert]))
        for token in tokens[:capacity]:
            kept[token, expert] = True
    return kept


@pytest.mark.parametrize(("experts", "topk"), SIZES)
@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("padded", [False, True])
def test_experts_keep_what_the_policy_says(
    experts: int, topk: int, policy: str, factor: float, padded: bool
) -> None:
    logits = drawn(TOKENS, experts).float()
    settings: dict[str, Any] = dict(use_pre_softmax=True)
    weights, chosen, _ = topk_softmax_with_capacity(logits, topk, **settings)
    found, routing_map, before = topk_softmax_with_capacity(
        logits, topk, factor, pad_to_capacity=padded, drop_policy=policy, **settings
    )
    capacity = min(math.ceil(TOKENS * topk / experts * factor), TOKENS)
    kept = kept_by_loop(weights, chosen, capacity, policy)
    assert torch.equal(before, chosen.sum(0))
    assert torch.equal(found, weights * kept)
    if padded:
        assert (routing_map.sum(0) == capacity).all()
        assert (routing_map & kept == kept).all()
        assert not (routing_map & chosen & ~kept).any()  # what was dropped does not come back as padding
    else:
        assert torch.equal(routing_map, kept)


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "none"])
@pytest.mark.parametrize("padded", [False, True])
def test_routers_with_a_capacity_route_like_the_function(kind: str, padded: bool) -> None:
    router = router_of(
        8,
        2,
        moe_router_load_balancing_type=kind,
        moe_expert_capacity_factor=0.75,
        moe_pad_expert_input_to_capacity=padded,
        moe_token_drop_policy="position",
    )
    hidden = drawn(TOKENS, 1, HIDDEN).float()
    probs, routing_map = router(hidden)
    logits = hidden.view(TOKENS, HIDDEN) @ router.weight.t()
    wanted = topk_softmax_with_capacity(logits, 2, 0.75, padded, "position")
    assert torch.equal(probs, wanted[0])
    assert torch.equal(routing_map, wanted[1])


def test_capacity_is_the_even_share_times_the_factor_rounded_up() -> None:
    assert get_capacity(96, 8, 1.0) == 12
    assert get_capacity(97, 8, 1.0) == 13
    assert get_capacity(96, 8, 1.25) == 15
    assert get_capacity(8, 64, 1.0) == 1
    assert get_capacity(8, 64, 1.0, min_capacity=4) == 4


def test_an_expert_takes_no_token_twice_however_large_its_capacity() -> None:
    assert rows_per_expert(num_tokens=4, topk=2, num_experts=2, capacity_factor=3.0) == 4
    weights, routing_map, _ = topk_softmax_with_capacity(drawn(4, 2), 2, 3.0, pad_to_capacity=True)
    assert routing_map.all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, dtype=torch.float64))


def test_weights_that_are_zero_are_kept_before_tokens_that_did_not_choose() -> None:
    """A sigmoid of a very small logit is 0 in half precision, but the token asked for the expert."""
    logits = torch.tensor([[-80.0, -60.0]] * 3 + [[-60.0, -80.0]], dtype=torch.float16)
    weights, routing_map, _ = topk_softmax_with_capacity(
        logits, 1, 0.5, pad_to_capacity=True, score_function="sigmoid"
    )
    assert not weights.any()
    assert routing_map[3, 0]


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="token drop policy 'last': use probs or position"):
        topk_softmax_with_capacity(drawn(4, 4), 2, 0.5, drop_policy="last")
