"""The choice of experts against loops over tokens, and against DeepSeek-V3's router in transformers."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.fusions.experts import topk_routing
from tests.reference_models import load_transformers

TOKENS, EXPERTS = 12, 8


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(result: tuple[Tensor, Tensor]) -> Tensor:
    """[t, E]"""
    weights, experts = result
    return weights.new_zeros(len(weights), EXPERTS).scatter(1, experts, weights)


def weights_of_token(logits: list[float], topk: int, score: str, pre_softmax: bool) -> list[float]:
    """Tries every set of experts: the one with the largest scores it is."""
    if score == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        scores = [math.exp(logit) for logit in logits]
    best = max(itertools.combinations(range(EXPERTS), topk), key=lambda some: sum(scores[e] for e in some))
    if score == "sigmoid":
        total = sum(scores[e] for e in best) if topk > 1 else 1.0
    else:
        total = sum(scores) if pre_softmax else sum(scores[e] for e in best)
    return [scores[e] / total if e in best else 0.0 for e in range(EXPERTS)]


@pytest.mark.parametrize("topk", [1, 2, 3, EXPERTS])
@pytest.mark.parametrize(
    ("score", "pre_softmax"), [("softmax", False), ("softmax", True), ("sigmoid", False)]
)
def test_weights_of_the_best_experts(score: str, pre_softmax: bool, topk: int) -> None:
    logits = drawn(TOKENS, EXPERTS)
    settings = dict(score_function=score, pre_softmax=pre_softmax)
    wanted = [weights_of_token(row, topk, score, pre_softmax) for row in logits.tolist()]
    wanted = torch.tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(dense(topk_routing(logits, topk, **settings)), wanted)
    scaled = dense(topk_routing(logits, topk, scaling_factor=2.5, **settings))
    torch.testing.assert_close(scaled, 2.5 * wanted)
    logits = logits[:4].clone().requires_grad_()
    torch.autograd.gradcheck(lambda x: topk_routing(x, topk, scaling_factor=2.5, **settings)[0], logits)


@pytest.mark.parametrize("pre_softmax", [False, True])
@pytest.mark.parametrize(("topk", "group_topk"), [(2, 2), (3, 3), (4, 2), (3, 2)])
def test_experts_of_the_best_groups_only(topk: int, group_topk: int, pre_softmax: bool) -> None:
    logits, size = drawn(40, EXPERTS), 2
    settings = dict(pre_softmax=pre_softmax)
    found = topk_routing(logits, topk, num_groups=4, group_topk=group_topk, **settings)
    for token, row in enumerate(logits):
        ranked = (row.softmax(0) if pre_softmax else row).tolist()
        groups = [sorted(ranked[g * size : (g + 1) * size], reverse=True) for g in range(4)]
        worth = [sum(group[: topk // group_topk]) for group in groups]
        kept = sorted(range(4), key=lambda g: worth[g], reverse=True)[:group_topk]
        allowed = [e for e in range(EXPERTS) if e // size in kept]
        best = sorted(allowed, key=lambda e: ranked[e], reverse=True)[:topk]
        assert sorted(found[1][token].tolist()) == sorted(best)


def test_the_router_of_deepseek() -> None:
    load_transformers()
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(0.3 * drawn(16, seed=3))
    logits, weights, experts = router(drawn(50, 16).float())
    leaf = logits.detach().requires_grad_()
    found = topk_routing(
        leaf, 4, "sigmoid", num_groups=4, group_topk=2, scaling_factor=2.5,
        expert_bias=router.e_score_correction_bias,
    )  # fmt: skip
    by_expert, order = experts.sort(1)
    found_by_expert, found_order = found[1].sort(1)
    assert torch.equal(found_by_expert, by_expert)
    torch.testing.assert_close(found[0].gather(1, found_order), weights.gather(1, order))
    factors = drawn(50, 4, seed=4).float()
    (wanted,) = torch.autograd.grad((weights.gather(1, order) * factors).sum(), logits)
    (found,) = torch.autograd.grad((found[0].gather(1, found_order) * factors).sum(), leaf)
    torch.testing.assert_close(found, wanted)


def test_half_precision_is_computed_in_fp32() -> None:
    logits = drawn(TOKENS, EXPERTS).to(torch.bfloat16)
    weights, experts = topk_routing(logits, 2)
    wide, wide_experts = topk_routing(logits.float(), 2)
    assert weights.dtype == torch.bfloat16 and torch.equal(experts, wide_experts)
    assert torch.equal(weights, wide.to(torch.bfloat16))


def test_no_tokens() -> None:
    weights, experts = topk_routing(drawn(0, EXPERTS), 2, num_groups=4, group_topk=2)
    assert weights.shape == experts.shape == (0, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(topk=2, score_function="relu"), "use softmax or sigmoid"),
        (dict(topk=2, expert_bias=torch.zeros(EXPERTS)), "goes with sigmoid scores"),
        (dict(topk=9), "choose 1 to 8"),
        (dict(topk=2, num_groups=4), "give both numbers"),
        (dict(topk=2, num_groups=3, group_topk=1), "groups have one size"),
        (dict(topk=2, num_groups=4, group_topk=3), "no more of them are kept"),
        (dict(topk=3, num_groups=4, group_topk=1), "no fewer experts"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        topk_routing(drawn(TOKENS, EXPERTS), **settings)
