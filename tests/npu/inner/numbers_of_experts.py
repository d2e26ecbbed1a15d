"""Level 2, a layer of experts: its points together, some of them switched off, and where defaults serve."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import megatron_npu
from megatron.core import overrides
from megatron.core.fusions.experts import permute_tokens, topk_routing, unpermute_tokens
from megatron.core.fusions.matmul import grouped_matmul
from megatron_npu.registry import replacements
from tests.npu.cpu_kernels import install_on_cpu

install_on_cpu()
TOKENS, WIDTH, EXPERTS, INNER = 10, 16, 6, 24


@pytest.fixture(autouse=True)
def active(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(overrides.DISABLE_VARIABLE, raising=False)
    megatron_npu.activate()
    for replacement in replacements().values():
        replacement.served_by_default.clear()
    yield
    overrides.enable_all()


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> list[torch.nn.Parameter]:
    """Of the router, and of both products: the shapes of Megatron's grouped experts."""
    shapes = (WIDTH, EXPERTS), (WIDTH, EXPERTS * INNER), (EXPERTS * INNER, WIDTH)
    return [torch.nn.Parameter(drawn(*shape, seed=seed)) for seed, shape in enumerate(shapes, 2)]


def layer(tokens: Tensor, parameters: list[torch.nn.Parameter], padded: bool, inside: bool) -> Tensor:
    router, first, second = parameters
    chosen_weights, experts = topk_routing(tokens @ router, 2)
    probs = chosen_weights.new_zeros(TOKENS, EXPERTS).scatter(1, experts, chosen_weights)
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter_(1, experts, True)
    topk, capacity = 2, None
    if padded:
        topk, capacity = None, 3
        chosen = probs.argsort(dim=0, descending=True, stable=True).argsort(0) < capacity
    rows, row_probs, where = permute_tokens(tokens, chosen, probs, topk, capacity)
    counts = chosen.sum(0)
    inner = grouped_matmul(rows, first, counts, True).tanh()
    if inside:
        inner = inner * row_probs.unsqueeze(1)
    rows = grouped_matmul(inner, second, counts, True)
    return unpermute_tokens(rows, where, chosen, None if inside else probs, topk, capacity)


def outcome(padded: bool, inside: bool) -> list[Tensor]:
    """Result and gradients."""
    tokens, parameters = drawn(TOKENS, WIDTH).requires_grad_(), weights()
    for parameter in parameters[1:]:
        parameter.main_grad = torch.ones_like(parameter, dtype=torch.float32)
    out = layer(tokens, parameters, padded, inside)
    out.backward(drawn(TOKENS, WIDTH, seed=9))
    return [out.detach(), tokens.grad, parameters[0].grad, *(p.main_grad for p in parameters[1:])]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("disabled", ["", "permute_tokens", "unpermute_tokens", "topk_routing"])
def test_a_layer_is_that_of_the_defaults(padded: bool, inside: bool, disabled: str) -> None:
    """A default and a replacement understand each other's places."""
    overrides.disable(disabled)
    found = outcome(padded, inside)
    overrides.disable("all")
    for one, wanted in zip(found, outcome(padded, inside), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_half_precision_are_added_to_fp32_by_the_operator() -> None:
    x, weight = drawn(TOKENS, WIDTH).bfloat16(), torch.nn.Parameter(drawn(4, WIDTH, INNER).bfloat16())
    weight.main_grad = torch.ones(4, WIDTH, INNER)
    counts, factors = torch.tensor([4, 0, 5, 1]), drawn(TOKENS, INNER, seed=4).bfloat16()
    grouped_matmul(x, weight, counts, True).backward(factors)
    parts = zip(x.double().split(counts.tolist()), factors.double().split(counts.tolist()), strict=True)
    wanted = 1.0 + torch.stack([rows.t() @ grads for rows, grads in parts])
    # Products rounded to bf16 would be 1e-3 away.
    torch.testing.assert_close(weight.main_grad.double(), wanted, rtol=1e-6, atol=1e-6)


def test_without_weights_no_rows_are_kept_for_backward() -> None:
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    chosen[:, 1:3] = True
    _, _, where = permute_tokens(drawn(TOKENS, WIDTH), chosen, None, 2, None)
    rows = drawn(2 * TOKENS, WIDTH).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        unpermute_tokens(rows, where, chosen, None, 2, None)
    assert kept and all(t.dtype == torch.bool for t in kept)


def reasons(name: str) -> set[str]:
    found = (r for path, r in replacements().items() if path.endswith(f".{name}"))
    return set(next(found).served_by_default)


def test_defaults_serve_what_the_operators_exclude() -> None:
    differing = drawn(TOKENS, EXPERTS) > 0
    tokens, probs = drawn(TOKENS, WIDTH), drawn(TOKENS, EXPERTS)
    rows, _, where = permute_tokens(tokens, differing, None, None, None)
    unpermute_tokens(rows, where, differing, None, None, None)
    twice = drawn(TOKENS, EXPERTS).argsort(1).argsort(1) < 2
    permute_tokens(tokens.half(), twice, probs, 2, None)
    permute_tokens(tokens[:0], twice[:0], None, 2, None)
    assert reasons("permute_tokens") == {
        "different numbers of experts a token", "weights of another type than the tokens", "no tokens",
    }  # fmt: skip
    assert reasons("unpermute_tokens") == {"different numbers of experts a token"}
    grouped_matmul(tokens[:0], drawn(2, WIDTH, INNER), torch.tensor([0, 0]), False)
    assert reasons("grouped_mm") == {"no rows"}
    topk_routing(probs[:0], 2)
    topk_routing(probs, 1, "sigmoid")
    topk_routing(probs, 2, num_groups=3, group_topk=1)
    topk_routing(drawn(TOKENS, 12), 4, "sigmoid", num_groups=3, group_topk=1)
    topk_routing(drawn(TOKENS, 12), 2, num_groups=3, group_topk=1)
    assert reasons("topk_routing") == {
        "no tokens", "one expert by its sigmoid", "groups of 2 or fewer, or over 2048 experts",
        "groups ranked by more than two experts, or by two logits",
    }  # fmt: skip
