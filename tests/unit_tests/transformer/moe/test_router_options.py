"""Sinkhorn, jitter, routing by force, and the buffers of routers."""

import math

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.moe_utils import sinkhorn
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.transformer.moe.routers import HIDDEN, config_of, drawn, router_of

SEQUENCE, BATCH = 32, 2
TOKENS = SEQUENCE * BATCH


@pytest.mark.parametrize(("tokens", "experts"), [(64, 8), (40, 64)])
def test_sinkhorn_has_even_rows_and_columns(tokens: int, experts: int) -> None:
    cost = drawn(tokens, experts)
    found = sinkhorn(cost, tol=1e-7).double()
    torch.testing.assert_close(found.sum(0), torch.full((experts,), 1.0 / experts, dtype=torch.float64))
    even = torch.full((tokens,), 1.0 / tokens, dtype=torch.float64)
    torch.testing.assert_close(found.sum(1), even, rtol=1e-3, atol=0)
    # Rescaled rows and columns of exp(cost), and nothing else: cross ratios are as they were.
    ratio = (found / cost.exp()).log()
    spread = ratio - ratio[:1] - ratio[:, :1] + ratio[:1, :1]
    assert spread.abs().max() < 1e-4


def test_sinkhorn_takes_large_logits_and_ends_where_one_is_not_a_number() -> None:
    assert sinkhorn(1000.0 * drawn(16, 4)).isfinite().all()
    broken = drawn(16, 4)
    broken[3, 1] = math.nan
    assert sinkhorn(broken).isnan().any()
    assert sinkhorn(torch.full((16, 4), math.inf)).isnan().any()


@pytest.mark.parametrize("topk", [1, 2])
def test_sinkhorn_routing_is_more_even_and_weighs_by_the_logits(topk: int) -> None:
    router = router_of(8, topk, moe_router_load_balancing_type="sinkhorn")
    with torch.no_grad():
        router.weight[0] *= 4.0
    hidden = drawn(SEQUENCE, BATCH, HIDDEN).float() + 0.5
    logits = hidden.view(TOKENS, HIDDEN) @ router.weight.t()
    scores = logits.sigmoid() if topk == 1 else logits.softmax(-1)
    loads = {}
    for training in (True, False):
        probs, routing_map = router.train(training)(hidden)
        assert (routing_map.sum(1) == topk).all()
        torch.testing.assert_close(probs, scores * routing_map)
        loads[training] = float(routing_map.sum(0).double().std())
    assert loads[True] < 0.5 * loads[False]
    best = logits.topk(topk).indices
    assert torch.equal(routing_map, torch.zeros_like(routing_map).scatter(1, best, True))


def test_jitter_multiplies_by_even_noise_around_one_in_training_only() -> None:
    eps, torch_seed = 0.1, 5
    router = router_of(8, 2, moe_input_jitter_eps=eps)
    ones = torch.ones(1000, 4, HIDDEN)
    torch.manual_seed(torch_seed)
    noise = router.apply_input_jitter(ones)
    assert 1.0 - eps <= noise.min() < 1.0 - 0.99 * eps
    assert 1.0 + 0.99 * eps < noise.max() <= 1.0 + eps
    assert abs(float(noise.mean()) - 1.0) < 1e-3  # five standard errors
    assert abs(float(noise.std()) - eps / math.sqrt(3.0)) < 1e-3
    assert not torch.equal(router.apply_input_jitter(ones), noise)
    assert router.eval().apply_input_jitter(ones) is ones
    hidden = drawn(SEQUENCE, BATCH, HIDDEN).float()
    assert torch.equal(router(hidden)[0], router_of(8, 2)(hidden)[0])


@pytest.mark.parametrize(("experts", "topk"), [(8, 1), (8, 2), (64, 6), (160, 6), (256, 8)])
def test_routing_by_force_is_even_whatever_the_scores(experts: int, topk: int) -> None:
    router = router_of(experts, topk, moe_router_force_load_balancing=True, moe_aux_loss_coeff=0.1)
    hidden = drawn(256, 2, HIDDEN).float()
    probs, routing_map = router(hidden)
    assert (routing_map.sum(1) == topk).all()
    loads = routing_map.sum(0)
    assert loads.max() - loads.min() <= 1
    torch.testing.assert_close(probs.sum(1), torch.ones(512))
    assert torch.equal(probs > 0, routing_map)


def test_buffers_stay_fp32_when_a_model_is_converted() -> None:
    router = router_of(8, 2, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    bias = torch.full((8,), 1.0 + 2.0**-20)  # which no 16-bit type holds
    assert router.expert_bias is not None and router.local_tokens_per_expert is not None
    router.expert_bias.copy_(bias)
    router.local_tokens_per_expert.fill_(1001.0)
    model = torch.nn.Sequential(router)
    for convert in (model.bfloat16, model.half, model.double, lambda: model.to(torch.bfloat16)):
        convert()
        assert router.weight.dtype is not torch.float32
        assert torch.equal(router.expert_bias, bias)
        assert torch.equal(router.local_tokens_per_expert, torch.full((8,), 1001.0))


def test_checkpoints_hold_the_weight_and_the_bias() -> None:
    assert list(router_of(8, 2).state_dict()) == ["weight"]
    biased = router_of(8, 2, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    state = biased.state_dict()
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == {
        "weight": ((8, HIDDEN), torch.float32),
        "expert_bias": ((8,), torch.float32),
    }


def test_a_config_without_experts_or_with_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_moe_experts: unset"):
        TopKRouter(TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=2))
    config = config_of(8, 2)
    config.moe_router_load_balancing_type = "sparsemixer_topk"
    with pytest.raises(ConfigError, match="'sparsemixer_topk' is not one of aux_loss, seq_aux_loss"):
        TopKRouter(config)


def test_weights_normalised_in_half_precision_are_finite_where_all_are_zero() -> None:
    router = router_of(
        8, 1, moe_router_score_function="sigmoid", norm_topk_prob=True, params_dtype=torch.float16
    )
    probs, _ = router.routing(torch.full((4, 1, 8), -100.0, dtype=torch.float16))
    assert probs.isfinite().all()


@pytest.mark.parametrize(
    "kind", ["softmax_topk", "pai_megatron_aux_loss", "group_limited_greedy", "sinkhorn"]
)
def test_scores_that_are_logged_are_a_softmax_where_the_score_function_is_not_read(kind: str) -> None:
    groups = dict(moe_router_num_groups=4, moe_router_group_topk=2) if kind.startswith("group") else {}
    router = router_of(
        8, 2, moe_router_load_balancing_type=kind, moe_router_score_function="sigmoid", **groups
    )
    logits = drawn(TOKENS, 8).float()
    torch.testing.assert_close(router.compute_routing_scores_for_aux_loss(logits), logits.softmax(-1))


def test_a_router_without_a_layer_number_tracks_nothing() -> None:
    router = router_of(8, 2, moe_aux_loss_coeff=0.1, log_moe_balance=True)
    router.layer_number = None
    router(drawn(SEQUENCE, BATCH, HIDDEN).float())
    assert not parallel_state.get_moe_layer_wise_logging_tracker()
