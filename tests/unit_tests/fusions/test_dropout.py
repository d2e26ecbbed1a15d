"""Dropout: rates, scaling, replay; attention with dropout against a dense computation with its mask."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron.core import accelerator
from megatron.core.fusions import fused_attention
from megatron.core.fusions.attention_masks import band_mask
from megatron.core.fusions.fused_attention import AttentionShape, attention_with_dropout
from megatron.core.fusions.fused_bias_dropout import dropout, keep_mask


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rate_and_scale(p, dtype):
    torch.manual_seed(1)
    x = torch.ones(1000, 333, dtype=dtype)
    out = dropout(x, p)
    dropped = (out == 0).double().mean()
    # Five standard deviations of a binomial share.
    assert float(dropped) == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / x.numel()))
    assert out[out != 0].double().mean() == pytest.approx(
        1 / (1 - p), rel=1e-2 if dtype is torch.bfloat16 else 1e-4
    )


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_extremes(p):
    x = torch.randn(50)
    assert torch.equal(dropout(x, p), F.dropout(x, p))


def test_neighbours_are_independent():
    """Lanes come four to a word: neighbours, and elements a word apart, must not be correlated."""
    keep, _ = keep_mask(torch.Size([400_000]), 0.5, 12)
    signs = keep.double() * 2 - 1
    for distance in (1, 2, 3, 4, 8, 64):
        correlation = float((signs[distance:] * signs[:-distance]).mean())
        assert abs(correlation) < 5 / math.sqrt(signs.numel()), distance


def test_state_of_the_generator_decides_the_mask():
    x = torch.ones(4000)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = dropout(x, 0.3), dropout(x, 0.3)
    torch.set_rng_state(state)
    assert torch.equal(dropout(x, 0.3), first)
    assert not torch.equal(first, second)


def test_gradient_uses_the_same_mask():
    x = torch.randn(600, requires_grad=True)
    out = dropout(x, 0.4)
    out.backward(torch.ones_like(out))
    assert torch.equal(x.grad != 0, out != 0)
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("masking", ["causal", "window", "padding", "none"])
def test_attention_against_dense(masking, groups, monkeypatch):
    """The mask of every block is recorded and laid into one dense float64 computation."""
    b, n, s, d, dv, p = 2, 4, 37, 8, 6, 0.3
    monkeypatch.setattr(fused_attention, "_QUERY_BLOCK", 16)
    monkeypatch.setattr(accelerator, "block_elements", lambda device: 500)
    torch.manual_seed(4)
    q, k, v = (
        torch.randn(b, heads, s, width, dtype=torch.float64, requires_grad=True)
        for heads, width in ((n, d), (groups, d), (groups, dv))
    )
    device = torch.device("cpu")
    hidden = {
        "causal": band_mask(s, s, None, True, device)[None, None],
        "window": band_mask(s, s, (5, 0), True, device)[None, None],
        "padding": (torch.arange(s) >= torch.tensor([[30], [s]]))[:, None, None, :].expand(b, 1, s, s),
        "none": None,
    }[masking]
    shape = AttentionShape(hidden, masking in ("causal", "window"), d**-0.5, p)
    seed = int(torch.randint(1 << 62, (), generator=torch.Generator().manual_seed(9)))
    torch.manual_seed(9)
    out = attention_with_dropout(q, k, v, shape)

    dropped = torch.zeros(b, n, s, s, dtype=torch.float64)
    r = n // groups
    for block in fused_attention._blocks(q, k, shape.causal, seed):
        rows = block.queries.stop - block.queries.start
        held = block.groups.stop - block.groups.start
        keep, scale = keep_mask(torch.Size([held, r * rows, block.keys.stop]), p, block.seed)
        target = dropped[block.sequence].view(groups, r, s, s)
        target[block.groups, :, block.queries, block.keys] = keep.view(held, r, rows, -1).double() * scale
    scores = torch.einsum("bnqd,bnkd->bnqk", q, k.repeat_interleave(r, 1)) * d**-0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -10000.0)
    expected = (torch.softmax(scores, -1) * dropped) @ v.repeat_interleave(r, 1)
    torch.testing.assert_close(out, expected)
    gradient = torch.randn_like(out)
    for found, wanted in zip(
        torch.autograd.grad(out, (q, k, v), gradient),
        torch.autograd.grad(expected, (q, k, v), gradient),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)
    visible = torch.ones(s, s, dtype=torch.bool) if hidden is None else ~hidden
    share = float((dropped == 0)[visible.expand(b, n, s, s)].double().mean())
    assert share == pytest.approx(p, abs=0.02)
