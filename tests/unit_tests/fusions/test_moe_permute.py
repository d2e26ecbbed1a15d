"""Order by expert, and back, against loops over tokens and experts."""

import pytest
import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.fusions.experts import permute_tokens, unpermute_tokens

TOKENS, EXPERTS, WIDTH = 9, 5, 7


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def routing_map(kind: str, tokens: int = TOKENS) -> tuple[Tensor, int | None, int | None]:
    """(map, topk, capacity); expert 3 is nobody's choice, unless every expert takes as many tokens."""
    scores = drawn(tokens, EXPERTS, seed=2)
    if kind == "capacity":
        return scores.argsort(0).argsort(0) < 4, None, 4
    if kind == "capacity, some left over":
        return scores.argsort(0).argsort(0) < 6, None, 4
    scores[:, 3] = -9.0
    if kind == "differing":
        chosen = scores > 0.3
        chosen[2] = False  # a token without experts
        return chosen, None, None
    topk = int(kind[-1])
    return scores.argsort(1).argsort(1) >= EXPERTS - topk, topk, None


KINDS = ["topk 1", "topk 3", "differing", "capacity", "capacity, some left over"]


def pairs_in_order(chosen: Tensor, capacity: int | None) -> list[tuple[int, int]]:
    """(token, expert) of every row."""
    pairs = []
    for expert in range(chosen.shape[1]):
        mine = [(token, expert) for token in range(len(chosen)) if chosen[token, expert]]
        pairs += mine[:capacity]
    return pairs


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_tokens_of_one_expert_after_the_other(kind: str) -> None:
    chosen, topk, capacity = routing_map(kind)
    tokens, probs = drawn(TOKENS, WIDTH).requires_grad_(), drawn(TOKENS, EXPERTS, seed=3).requires_grad_()
    rows, row_probs, _ = permute_tokens(tokens, chosen, probs, topk, capacity)
    pairs = pairs_in_order(chosen, capacity)
    assert torch.equal(rows, torch.stack([tokens[token] for token, _ in pairs]))
    assert torch.equal(row_probs, torch.stack([probs[pair] for pair in pairs]))

    weights, factors = drawn(*rows.shape, seed=4), drawn(len(rows), seed=5)
    found = torch.autograd.grad([rows, row_probs], [tokens, probs], [weights, factors])
    wanted = [torch.zeros_like(tokens), torch.zeros_like(probs)]
    for row, pair in enumerate(pairs):
        wanted[0][pair[0]] += weights[row]
        wanted[1][pair] = factors[row]
    torch.testing.assert_close(list(found), wanted)


@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_summed_up_per_token(kind: str, with_probs: bool) -> None:
    chosen, topk, capacity = routing_map(kind)
    _, _, where = permute_tokens(drawn(TOKENS, WIDTH), chosen, None, topk, capacity)
    pairs = pairs_in_order(chosen, capacity)
    rows = drawn(len(pairs), WIDTH, seed=6).requires_grad_()
    probs = drawn(TOKENS, EXPERTS, seed=3).requires_grad_() if with_probs else None
    leaves = [rows] if probs is None else [rows, probs]
    found = unpermute_tokens(rows, where, chosen, probs, topk, capacity)
    wanted = [torch.zeros(WIDTH, dtype=rows.dtype) for _ in range(TOKENS)]
    for row, (token, expert) in enumerate(pairs):
        wanted[token] = wanted[token] + rows[row] * (1.0 if probs is None else probs[token, expert])
    wanted = torch.stack(wanted)
    torch.testing.assert_close(found, wanted)
    weights = drawn(TOKENS, WIDTH, seed=7)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, weights), torch.autograd.grad(wanted, leaves, weights)
    )


def test_without_a_topk_places_are_the_tokens_of_the_rows() -> None:
    chosen, _, _ = routing_map("topk 3")
    _, _, where = permute_tokens(drawn(TOKENS, WIDTH), chosen, None, None, None)
    assert where.tolist() == [token for token, _ in pairs_in_order(chosen, None)]
    _, _, where = permute_tokens(drawn(TOKENS, WIDTH), chosen, None, 3, None)
    pairs = pairs_in_order(chosen, None)
    assert where.tolist() == [row for _, row in sorted((pair, row) for row, pair in enumerate(pairs))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["topk 3", "differing"])
def test_half_precision_is_rounded_once(kind: str, dtype: torch.dtype) -> None:
    chosen, topk, capacity = routing_map(kind)
    tokens = drawn(TOKENS, 64, dtype=dtype).requires_grad_()
    rows, _, where = permute_tokens(tokens, chosen, None, topk, capacity)
    rows = drawn(*rows.shape, dtype=dtype, seed=6)
    exact = torch.zeros(TOKENS, 64, dtype=torch.float64)
    for row, (token, _) in enumerate(pairs_in_order(chosen, None)):
        exact[token] += rows[row].double()
    found = unpermute_tokens(rows, where, chosen, None, topk, capacity)
    assert found.dtype == dtype
    # Sums are fp32: a last bit may go the other way where they lie half-way.
    assert (found.double() - exact).norm() <= 1.01 * (exact.to(dtype).double() - exact).norm()
    probs = drawn(TOKENS, EXPERTS, dtype=torch.float32, seed=3).requires_grad_()
    weighted = unpermute_tokens(rows, where, chosen, probs, topk, capacity)
    weighted.sum().backward()
    assert weighted.dtype == dtype and probs.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["topk 2", "differing"])
def test_no_tokens(kind: str) -> None:
    chosen, topk = torch.zeros(0, EXPERTS, dtype=torch.bool), 2 if kind == "topk 2" else None
    tokens = drawn(0, WIDTH).requires_grad_()
    rows, row_probs, where = permute_tokens(tokens, chosen, drawn(0, EXPERTS), topk, None)
    assert rows.shape == (0, WIDTH) and row_probs.shape == (0,)
    out = unpermute_tokens(rows, where, chosen, drawn(0, EXPERTS), topk, None)
    out.sum().backward()
    assert out.shape == tokens.grad.shape == (0, WIDTH)


def test_a_map_that_breaks_a_promise_is_refused() -> None:
    tokens = drawn(TOKENS, WIDTH)
    chosen, _, _ = routing_map("differing")
    with pytest.raises(ConfigError, match="topk 2 was promised"):
        permute_tokens(tokens, chosen, None, 2, None)
    with pytest.raises(ConfigError, match="capacity 4 was promised"):
        permute_tokens(tokens, chosen, None, None, 4)
    with pytest.raises(ConfigError, match="leave one of them None"):
        permute_tokens(tokens, chosen, None, 2, 4)
