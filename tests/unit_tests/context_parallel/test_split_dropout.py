"""Dropout of attention over a split sequence, against the masks it drew."""

from dataclasses import replace

import pytest
import torch

from tests.distributed.pool import run_ranks
from tests.unit_tests.context_parallel.split_world import (
    BATCH,
    HEADS,
    Case,
    build,
    hidden_keys,
    operands,
    part,
    reference,
    split_run,
    start,
)

P = 0.3
SIZE = 2
LENGTH = 2 * SIZE * 8


def drawn_and_used(case: Case):
    """On a rank: dropped weights of its rows, then output and gradients under the same masks."""
    rank = start(SIZE, case.hierarchy)
    layer = build(case, SIZE)
    layer.attention_dropout = P
    state = torch.get_rng_state()
    seen = dropped_weights(case, rank, layer)
    layer.eval()
    kept = dropped_weights(case, rank, layer)
    layer.train()
    again = dropped_weights(case, rank, layer)
    torch.set_rng_state(state)
    start(SIZE, case.hierarchy)
    return seen, kept, again, split_run(case, rank, SIZE, layer)


def dropped_weights(case: Case, rank: int, layer) -> torch.Tensor:
    """The layer's weights, by taking unit vectors for values.  [s/2, b, n, s]"""
    q, k, _, _ = operands(case, SIZE)
    unit = torch.eye(LENGTH, dtype=q.dtype)[:, None, None, :].expand(LENGTH, BATCH, case.groups, LENGTH)
    with torch.no_grad():
        out = layer(*(part(t, rank, SIZE) for t in (q, k, unit)), None)
    return out.unflatten(-1, (HEADS, LENGTH))


def joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """Rows of both ranks in the order of the sequence."""
    (a, b), (c, d) = (t.chunk(2) for t in parts)
    return torch.cat((a, c, d, b))


CASES = [
    Case(kind, groups=2, chunk=8, backend=backend, window=window, spread=0.7)
    for kind, backend, window in (
        ("p2p", "fused", None),
        ("p2p", "fused", (10, 0)),
        ("all_gather", "fused", None),
        ("all_gather", "unfused", (10, 0)),
        ("a2a", "fused", None),
        ("a2a", "unfused", None),
    )
]
CASES += [Case("a2a+p2p", groups=2, chunk=8, hierarchy=h, spread=0.7) for h in ((2, 1), (1, 2))]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.kind}-{c.backend}-{c.window}")
def test_masks(case):
    answers = run_ranks(SIZE, drawn_and_used, case)
    # [s, b, n, s] -> [b, n, s, s]
    dropped, weights, again = (
        joined([answer[i] for answer in answers]).permute(1, 2, 0, 3) for i in range(3)
    )
    visible = ~hidden_keys(case, LENGTH).expand_as(weights)
    assert torch.equal(weights > 0, visible)
    keep = dropped > 0
    torch.testing.assert_close(dropped[keep], weights[keep] / (1 - P), rtol=2e-4, atol=1e-7)
    check_statistics(keep, visible)
    # The next call draws new masks.
    check_independent((again > 0)[visible], keep[visible])
    wanted = reference(case, SIZE, keep.double() / (1 - P))
    for number, (name, w) in enumerate(zip(("output", "dq", "dk", "dv"), wanted, strict=True)):
        found = joined([answer[3][number] for answer in answers])
        # Lanes round the probability to 2^-16.
        torch.testing.assert_close(found.double(), w, rtol=0, atol=1e-4 * float(w.abs().max()), msg=name)


def check_statistics(keep, visible):
    drawn = keep[visible].double()
    deviation = (P * (1 - P) / drawn.numel()) ** 0.5
    assert abs(float(drawn.mean()) - (1 - P)) < 4 * deviation
    # Ranks, heads and sequences differ: halves of the rows belong to other chunks, quarters to both ranks.
    first = LENGTH // 4
    diagonal = visible[0, 0, :first, :first]
    square = [slice(i * first, (i + 1) * first) for i in range(4)]
    chunks = [keep[:, :, rows, rows][:, :, diagonal] for rows in square]
    for i in range(4):
        for j in range(i):
            check_independent(chunks[i], chunks[j])
    check_independent(keep[0][visible[0]], keep[1][visible[1]])
    for head in range(1, HEADS):
        check_independent(keep[:, 0][visible[:, 0]], keep[:, head][visible[:, head]])


def check_independent(a, b):
    """Two masks agree as often as chance has it, within five deviations."""
    agree = P * P + (1 - P) * (1 - P)
    deviation = (agree * (1 - agree) / a.numel()) ** 0.5
    assert abs(float((a == b).double().mean()) - agree) < 5 * deviation


def test_wide_values():
    """Widths of keys and values may differ where there is dropout."""
    case = replace(CASES[0], value_width=12)
    answers = run_ranks(SIZE, drawn_and_used, case)
    keep = joined([answer[0] for answer in answers]).permute(1, 2, 0, 3) > 0
    wanted = reference(case, SIZE, keep.double() / (1 - P))
    for number, w in enumerate(wanted):
        found = joined([answer[3][number] for answer in answers])
        torch.testing.assert_close(found.double(), w, rtol=0, atol=1e-4 * float(w.abs().max()))
