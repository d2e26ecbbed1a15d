"""Helpers of ``moe_utils`` that only scripts call: rows by expert and back, and chunks of rows."""

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    group_limited_topk,
    maybe_move_tensor_to_cpu,
    permute,
    sort_chunks_by_idxs,
    topk_softmax_with_capacity,
    unpermute,
)
from tests.unit_tests.transformer.moe.routers import drawn

TOKENS, WIDTH = 12, 5
# Experts of a layer, and of a token.
SIZES = [(8, 1), (8, 2), (64, 6)]


def routed(experts: int, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """[t, h] tokens, [t, E] weights, [t, E] bool map."""
    probs, routing_map, _ = topk_softmax_with_capacity(drawn(TOKENS, experts, seed=2), topk)
    return drawn(TOKENS, WIDTH), probs, routing_map


@pytest.mark.parametrize(("experts", "topk"), SIZES)
def test_permute_puts_the_tokens_of_expert_0_first(experts: int, topk: int) -> None:
    tokens, probs, routing_map = routed(experts, topk)
    pairs = [(e, t) for e in range(experts) for t in range(TOKENS) if routing_map[t, e]]
    rows, weights, indices = permute(tokens, routing_map, probs, num_out_tokens=TOKENS * topk)
    assert indices.tolist() == [t for _, t in pairs]
    assert torch.equal(rows, torch.stack([tokens[t] for _, t in pairs]))
    assert weights is not None
    assert torch.equal(weights, torch.stack([probs[t, e] for e, t in pairs]))
    assert permute(tokens, routing_map)[1] is None


@pytest.mark.parametrize(("experts", "topk"), SIZES)
def test_unpermute_sums_the_rows_of_each_token(experts: int, topk: int) -> None:
    tokens, probs, routing_map = routed(experts, topk)
    tokens.requires_grad_()
    rows, _, indices = permute(tokens, routing_map)
    plain = unpermute(rows, indices, tokens.shape)
    torch.testing.assert_close(plain, tokens * topk)
    weighted = unpermute(rows, indices, tokens.shape, probs=probs, routing_map=routing_map)
    total = probs.sum(1, keepdim=True)
    torch.testing.assert_close(weighted, tokens * total)
    (gradient,) = torch.autograd.grad(weighted.sum(), tokens)
    torch.testing.assert_close(gradient, total.expand_as(tokens))


@pytest.mark.parametrize("padded", [False, True])
def test_permute_with_a_capacity_takes_as_many_rows_for_every_expert(padded: bool) -> None:
    tokens, _, _ = routed(8, 2)
    probs, routing_map, _ = topk_softmax_with_capacity(drawn(TOKENS, 8, seed=2), 2, 0.5, pad_to_capacity=True)
    capacity = 2  # ceil(12 * 2 / 8 * 0.5)
    assert (routing_map.sum(0) == capacity).all()
    rows, weights, indices = permute(tokens, routing_map, probs, 8 * capacity, drop_and_pad=padded)
    assert indices.tolist() == [t for e in range(8) for t in range(TOKENS) if routing_map[t, e]]
    assert torch.equal(rows, tokens[indices])
    assert weights is not None and len(weights) == 16
    back = unpermute(rows, indices, tokens.shape, probs, routing_map, drop_and_pad=padded)
    torch.testing.assert_close(back, tokens * probs.sum(1, keepdim=True))


def test_unpermute_with_weights_needs_the_map() -> None:
    tokens, probs, routing_map = routed(8, 2)
    rows, _, indices = permute(tokens, routing_map)
    with pytest.raises(ConfigError, match="probs need the routing_map"):
        unpermute(rows, indices, tokens.shape, probs=probs)


def test_chunks_of_rows_change_places() -> None:
    rows = torch.arange(12.0).view(6, 2)
    sizes, order = torch.tensor([1, 0, 3, 2]), torch.tensor([3, 0, 1, 2])
    moved, none = sort_chunks_by_idxs(rows, sizes, order)
    assert none is None
    assert moved[:, 0].tolist() == [8.0, 10.0, 0.0, 2.0, 4.0, 6.0]
    _, weights = sort_chunks_by_idxs(rows, sizes, order, probs=torch.arange(6.0))
    assert weights is not None
    assert weights.tolist() == [4.0, 5.0, 0.0, 1.0, 2.0, 3.0]


def test_group_limited_topk_looks_at_the_best_of_each_group() -> None:
    scores = torch.tensor([[0.9, 0.0, 0.5, 0.6, 0.3, 0.4]])  # groups of two; the second has the largest sum
    found, experts = group_limited_topk(scores, 2, 1, 6, num_groups=3, group_topk=1)
    assert experts.tolist() == [[3, 2]]
    assert found.tolist() == [pytest.approx([0.6, 0.5])]
    _, experts = group_limited_topk(scores, 2, 1, 6, num_groups=3, group_topk=2)
    assert experts.tolist() == [[0, 3]]


def test_the_loss_gets_its_scale_for_a_gradient_and_the_output_its_own() -> None:
    output, loss = torch.ones(3, requires_grad=True), torch.tensor(5.0, requires_grad=True)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(4.0))
    (MoEAuxLossAutoScaler.apply(output, 2.0 * loss) * 7.0).sum().backward()
    assert output.grad is not None and loss.grad is not None
    assert output.grad.tolist() == [7.0, 7.0, 7.0]
    assert float(loss.grad) == 8.0


def test_tensors_move_to_the_host_and_other_things_stay() -> None:
    tensor = torch.arange(3)
    array = maybe_move_tensor_to_cpu(tensor, as_numpy=True)
    assert isinstance(array, np.ndarray) and array.tolist() == [0, 1, 2]
    assert maybe_move_tensor_to_cpu(tensor).tolist() == [0, 1, 2]
    assert maybe_move_tensor_to_cpu([1]) == [1]
    assert maybe_move_tensor_to_cpu(None, as_numpy=True) is None
