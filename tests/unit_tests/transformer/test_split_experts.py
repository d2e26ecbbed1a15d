"""Experts on several ranks give what one rank gives: outputs, and gradients of tokens and all weights."""

import pytest
import torch
from split_experts import EXPERTS, HIDDEN, KINDS, TOKENS, WIDTH, Case, compare, routing, run, tokens, wanted

from megatron.core.transformer.moe.moe_layer import DISPATCHERS
from tests.distributed.pool import run_ranks

# (tp, ep, etp) -> ranks
SPREADS = {
    (1, 2, 1): 2,
    (1, 1, 2): 2,
    (2, 1, 1): 2,
    (2, 2, 1): 2,
    (1, 4, 1): 4,
    (1, 2, 2): 4,
    (2, 2, 2): 4,
    (2, 4, 1): 4,
    (1, 2, 1, "two replicas"): 4,
}
CASES = [
    Case(*spread[:3], dispatcher, kind)
    for spread in SPREADS
    for dispatcher, kind in zip(["allgather", "alltoall", "flex"], KINDS, strict=True)
]
MORE = [
    Case(2, 2, 2, "alltoall_seq", "grouped"),
    Case(1, 2, 1, "alltoall_seq", "te-grouped"),
    *(
        Case(*spread, dispatcher, kind, "drop")
        for spread in [(1, 2, 1), (2, 2, 1), (1, 1, 2)]
        for dispatcher, kind in [("alltoall", "grouped"), ("allgather", "sequential")]
    ),
    *(
        Case(*spread, dispatcher, kind, "pad")
        for spread in [(1, 2, 1), (2, 2, 1), (1, 1, 2)]
        for dispatcher, kind in [("alltoall", "te-grouped"), ("allgather", "grouped")]
    ),
]


def compare_all(cases):
    from megatron.core import parallel_state

    found = []
    for case in cases:
        found += [f"{case}: {problem}" for problem in compare(case)]
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_give_what_one_gives(ranks):
    sizes = {spread[:3]: size for spread, size in SPREADS.items() if len(spread) == 3}
    cases = [case for case in CASES + MORE if sizes[(case.tp, case.ep, case.etp)] == ranks]
    if ranks == 4:
        cases += [case for case in CASES if (case.tp, case.ep, case.etp) == (1, 2, 1)]
        cases += [Case(2, 2, 2, kind=kind, routing=how) for kind in KINDS for how in ("drop", "pad")]
    for problems in run_ranks(ranks, compare_all, list(dict.fromkeys(cases))):
        assert not problems, "\n".join(problems)


def by_hand(x, probs, chosen, experts):
    """Each token through each of its experts, by the formulas: down(silu(gate x) * (up x) * weight)."""
    total = torch.zeros_like(x)
    for number, expert in enumerate(experts.local_experts):
        gate, up = expert.linear_fc1.weight.chunk(2)
        for token in range(len(x)):
            if chosen[token, number]:
                inner = torch.nn.functional.silu(gate @ x[token, 0]) * (up @ x[token, 0])
                total[token, 0] += expert.linear_fc2.weight @ (inner * probs[token, number])
    return total


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("how", ["dropless", "drop", "pad"])
def test_one_rank_gives_the_formula(dispatcher, how):
    if (dispatcher, how) == ("flex", "pad"):
        pytest.skip("the config refuses it")
    case = Case(dispatcher=dispatcher, routing=how)
    output, grad_x, grad_probs, experts = run(case)
    x = tokens().requires_grad_()
    probs, chosen = routing(case, 1)
    probs.requires_grad_()
    expected = by_hand(x, probs, chosen, experts)
    torch.testing.assert_close(output, expected.detach())
    weights = list(experts.parameters())
    expected_x, expected_probs, *expected_weights = torch.autograd.grad(
        expected, [x, probs, *weights], wanted(), materialize_grads=True
    )
    torch.testing.assert_close(grad_x, expected_x)
    # A weight of zero has a gradient too, where its expert was chosen.
    torch.testing.assert_close(grad_probs, expected_probs)
    for parameter, gradient in zip(weights, expected_weights, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sequential"])
def test_activations_are_recomputed_with_equal_gradients(kind):
    recomputed = (("recompute_granularity", "selective"), ("recompute_modules", ["moe_act"]))
    plain, again = run(Case(kind=kind)), run(Case(kind=kind, fields=recomputed))
    for one, other in zip(plain[:3], again[:3], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(plain[3].parameters(), again[3].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_grouped_and_sequential_experts_start_alike():
    sequential, grouped = run(Case())[3], run(Case(kind="grouped"))[3]
    first = sequential.local_experts[3]
    blocks = grouped.weight1.view(EXPERTS, HIDDEN, 2 * WIDTH)
    assert torch.equal(blocks[3].t(), first.linear_fc1.weight)
    assert torch.equal(grouped.weight2.view(EXPERTS, WIDTH, HIDDEN)[3].t(), first.linear_fc2.weight)
    assert not torch.equal(blocks[3], blocks[4])


def test_weights_can_be_applied_to_the_input():
    """x * weight before a linear (ungated, unbent) expert is what the weight does after it."""
    case = Case(fields=(("moe_apply_probs_on_input", True),))
    x = tokens()[:, 0]
    from split_experts import build

    object.__setattr__(case, "fields", ())
    experts, _ = build(case)
    experts.config.moe_apply_probs_on_input = True
    counts = torch.tensor([TOKENS] + [0] * (EXPERTS - 1))
    weights = torch.rand(TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, _ = experts(x, counts, weights)
    expected, _ = experts.local_experts[0](x * weights.unsqueeze(1))
    torch.testing.assert_close(found, expected)
