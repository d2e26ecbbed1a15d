"""Weights and experts of tokens against the routers of the transformers library, with drawn weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.transformer.moe.router import TopKRouter
from tests.reference_models import load_transformers
from tests.unit_tests.transformer.moe.routers import HIDDEN, drawn, router_of

SEQUENCE, BATCH = 48, 2
# Experts of a layer, and of a token.
SIZES = [(8, 1), (8, 2), (64, 6), (128, 8), (160, 6), (256, 8)]


def compare(router: TopKRouter, reference: Any, seed: int = 1) -> None:
    """Both route the same tokens; also the gradients of the weights are the same."""
    hidden = drawn(SEQUENCE, BATCH, HIDDEN, seed=seed).float()
    with torch.no_grad():
        reference.weight.copy_(router.weight)
    probs, routing_map = router(hidden)
    _, weights, experts = reference(hidden)
    wanted = torch.zeros_like(probs).scatter(1, experts, weights.to(probs.dtype))
    assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, experts, True))
    torch.testing.assert_close(probs, wanted, rtol=1e-5, atol=1e-6)
    direction = drawn(*probs.shape, seed=seed + 1).float()
    (found,) = torch.autograd.grad((probs * direction).sum(), router.weight)
    (expected,) = torch.autograd.grad((wanted * direction).sum(), reference.weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def reference_router(family: str, name: str, **fields: Any) -> Any:
    """A router of transformers, with a config of these fields."""
    load_transformers()
    import importlib

    package = importlib.import_module(f"transformers.models.{family}")
    config = getattr(package, name + "Config")(hidden_size=HIDDEN, num_attention_heads=2, **fields)
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    spelling = "TopKRouter" if hasattr(module, name + "TopKRouter") else "TopkRouter"
    return getattr(module, name + spelling)(config)


@pytest.mark.parametrize(("experts", "topk"), SIZES[1:])  # over one logit it would be 1, which is refused
def test_a_softmax_over_the_chosen_is_mixtrals(experts: int, topk: int) -> None:
    reference = reference_router("mixtral", "Mixtral", num_local_experts=experts, num_experts_per_tok=topk)
    compare(router_of(experts, topk), reference)
    compare(router_of(experts, topk, norm_topk_prob=True), reference)


@pytest.mark.parametrize(("experts", "topk"), SIZES)
@pytest.mark.parametrize("normalised", [False, True])
def test_a_softmax_over_all_is_qwens(experts: int, topk: int, normalised: bool) -> None:
    reference = reference_router(
        "qwen3_moe",
        "Qwen3Moe",
        num_experts=experts,
        num_experts_per_tok=topk,
        norm_topk_prob=normalised,
    )
    fields: dict[str, Any] = dict(norm_topk_prob=normalised)
    compare(router_of(experts, topk, moe_router_pre_softmax=True, **fields), reference)
    compare(router_of(experts, topk, moe_router_load_balancing_type="softmax_topk", **fields), reference)
    if not normalised:
        compare(router_of(experts, topk, moe_router_load_balancing_type="pai_megatron_aux_loss"), reference)


@pytest.mark.parametrize(
    ("experts", "topk", "groups", "kept"), [(8, 1, 4, 2), (8, 2, 4, 2), (64, 6, 8, 3), (160, 6, 8, 3)]
)
def test_group_limited_greedy_is_deepseek_v2s(experts: int, topk: int, groups: int, kept: int) -> None:
    reference = reference_router(
        "deepseek_v2",
        "DeepseekV2",
        n_routed_experts=experts,
        num_experts_per_tok=topk,
        topk_method="group_limited_greedy",
        n_group=groups,
        topk_group=kept,
        routed_scaling_factor=16.0,
    )
    router = router_of(
        experts,
        topk,
        moe_router_load_balancing_type="group_limited_greedy",
        moe_router_num_groups=groups,
        moe_router_group_topk=kept,
        moe_router_topk_scaling_factor=16.0,
    )
    compare(router, reference)


@pytest.mark.parametrize(
    ("experts", "topk", "groups", "kept"), [(64, 6, 8, 3), (128, 8, 8, 4), (256, 8, 8, 4)]
)
@pytest.mark.parametrize("kind", ["none", "seq_aux_loss", "aux_loss"])
def test_biased_sigmoids_in_groups_are_deepseek_v3s(
    experts: int, topk: int, groups: int, kept: int, kind: str
) -> None:
    reference = reference_router(
        "deepseek_v3",
        "DeepseekV3",
        n_routed_experts=experts,
        num_experts_per_tok=topk,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    router = router_of(
        experts,
        topk,
        moe_router_load_balancing_type=kind,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=groups,
        moe_router_group_topk=kept,
        moe_router_topk_scaling_factor=2.5,
    )
    reference.e_score_correction_bias.copy_(router.expert_bias)
    compare(router, reference)


def test_norm_topk_prob_takes_the_place_of_the_factor_in_group_limited_greedy() -> None:
    fields: dict[str, Any] = dict(
        moe_router_load_balancing_type="group_limited_greedy",
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=16.0,
    )
    hidden = drawn(SEQUENCE, BATCH, HIDDEN).float()
    scaled, chosen = router_of(8, 2, **fields)(hidden)
    normalised, chosen_too = router_of(8, 2, norm_topk_prob=True, **fields)(hidden)
    assert torch.equal(chosen, chosen_too)
    torch.testing.assert_close(normalised, scaled / scaled.sum(-1, keepdim=True))


def weights_in(dtype: torch.dtype, **fields: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Weights and map of a bf16 model's router, and the logits in float64."""
    router = router_of(64, 6, moe_router_pre_softmax=True, params_dtype=torch.bfloat16, **fields)
    hidden = drawn(SEQUENCE, BATCH, HIDDEN).bfloat16()
    probs, routing_map = router(hidden)
    assert probs.dtype == dtype
    return probs, routing_map, hidden.double().view(-1, HIDDEN) @ router.weight.double().t()


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"), [("fp32", torch.float32, 1e-6), ("fp64", torch.float64, 1e-14)]
)
def test_router_dtype_keeps_the_logits_of_a_half_precision_model_exact(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    probs, routing_map, logits = weights_in(dtype, moe_router_dtype=name)
    scores = logits.softmax(-1)
    experts = scores.topk(6).indices
    assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, experts, True))
    torch.testing.assert_close(probs.double(), scores * routing_map, rtol=0, atol=tolerance)


def test_without_router_dtype_logits_are_as_wide_as_the_model() -> None:
    probs, routing_map, logits = weights_in(torch.bfloat16)
    scores = logits.softmax(-1) * routing_map
    torch.testing.assert_close(probs.double(), scores, rtol=0.05, atol=0.01)
    assert not torch.allclose(probs.double(), scores, rtol=0, atol=1e-6)
