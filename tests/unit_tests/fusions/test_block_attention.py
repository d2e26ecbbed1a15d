"""Block attention and its merge against dense float64."""

from unittest import mock

import pytest
import torch

from megatron.core import accelerator
from megatron.core.fusions import block_attention as block_attention_module
from megatron.core.fusions.attention_masks import Band, masked_by_band
from megatron.core.fusions.block_attention import (
    NOTHING_VISIBLE,
    BlockShape,
    block_attention,
    block_attention_backward,
    merge_attention,
    replayable_keep_mask,
)

B, N, D, SCALE = 2, 4, 8, 0.4
BANDS = [Band(), Band(None, 0), Band(2, 0), Band(None, -3), Band(-2, None), Band(-4, 9), Band(3, 3)]
SIZES = [(7, 7), (5, 11), (11, 4)]  # (queries, keys)


def operands(sq, sk, groups, width=D, dtype=torch.float32, spread=1.5):
    torch.manual_seed(3)
    shapes = ((sq, B, N, D), (sk, B, groups, D), (sk, B, groups, width), (sq, B, N, width))
    return tuple((spread * torch.randn(shape)).to(dtype) for shape in shapes)


def by_rule(band, sq, sk):
    """True hides, as two loops would have it."""
    ahead = torch.arange(sk)[None, :] - torch.arange(sq)[:, None]
    left, right = band
    hidden = torch.zeros(sq, sk, dtype=torch.bool)
    if left is not None:
        hidden |= -ahead > left
    if right is not None:
        hidden |= ahead > right
    return hidden[None, None]


def dense(q, k, v, hidden, keep=1.0, cap=None):
    """Output [sq, b, n, dv] and log-sum-exp [b, n, sq] in float64; 0 and the constant for nothing seen."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(N // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) * SCALE
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.clamp(min=NOTHING_VISIBLE)[..., None]) * keep
    return torch.einsum("bnqk,kbnd->qbnd", weights, v), lse.clamp(min=NOTHING_VISIBLE)


NO_BAND = Band()


def arguments(band=NO_BAND, mask=None, p=0.0, seed=11):
    return {
        "band": band,
        "attention_mask": mask,
        "softmax_scale": SCALE,
        "dropout_p": p,
        "dropout_seed": seed,
    }


def random_mask(sq, sk, batch=B):
    torch.manual_seed(9)
    mask = torch.rand(batch, 1, sq, sk) < 0.5
    mask[0, 0, 1] = True  # a query that sees nothing
    return mask


def check(q, k, v, grad, hidden, settings, bound=6e-6, keep=1.0):
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    wanted_out, wanted_lse = dense(*wide, hidden, keep, settings.get("softcap"))
    out, lse = block_attention(q, k, v, **settings)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), wanted_lse.detach(), rtol=1e-5, atol=1e-5)
    close(out, wanted_out, bound)
    found = block_attention_backward(grad, q, k, v, out.to(q.dtype), lse, **settings)
    wanted = torch.autograd.grad(wanted_out, wide, grad.double())
    for f, w in zip(found, wanted, strict=True):
        close(f, w, bound)


def close(found, wanted, bound):
    assert found.shape == wanted.shape
    limit = bound * max(1.0, float(wanted.detach().abs().max()))
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=0, atol=limit)


@pytest.mark.parametrize("width", [D, 6], ids=["kernel", "steps"])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("band", BANDS, ids=str)
def test_bands(band, groups, width):
    for sq, sk in SIZES:
        q, k, v, grad = operands(sq, sk, groups, width)
        hidden = by_rule(band, sq, sk)
        assert torch.equal(masked_by_band(sq, sk, band, q.device), hidden[0, 0])
        check(q, k, v, grad, hidden, arguments(band))


@pytest.mark.parametrize("width", [D, 6], ids=["kernel", "steps"])
@pytest.mark.parametrize("band", [Band(), Band(2, 0), Band(None, 5), Band(-4, 270)], ids=str)
def test_several_stripes(band, width):
    q, k, v, grad = operands(300, 270, 2, width)
    check(q, k, v, grad, by_rule(band, 300, 270), arguments(band))


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("width", [D, 6], ids=["kernel", "steps"])
def test_masks(width, batch):
    for (sq, sk), band in (((7, 7), Band()), ((260, 9), Band()), ((260, 40), Band(4, 2))):
        q, k, v, grad = operands(sq, sk, 2, width)
        mask = random_mask(sq, sk, batch)
        check(q, k, v, grad, mask | by_rule(band, sq, sk), arguments(band, mask))


@pytest.mark.parametrize("cap", [0.5, 3.0])
def test_soft_cap(cap):
    """Scores reach about 20, so that most of them are bent."""
    for (sq, sk), band in (((7, 7), Band(None, 0)), ((5, 11), Band()), ((300, 270), Band(20, 3))):
        q, k, v, grad = operands(sq, sk, 2, spread=3.0)
        mask = random_mask(sq, sk)
        hidden = by_rule(band, sq, sk)
        check(q, k, v, grad, hidden, arguments(band) | {"softcap": cap}, bound=2e-5)
        check(q, k, v, grad, mask | hidden, arguments(band, mask) | {"softcap": cap}, bound=2e-5)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2.5e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("width", [D, 6], ids=["kernel", "steps"])
def test_half_precision(dtype, bound, width):
    q, k, v, grad = operands(9, 9, 2, width, dtype)
    for band in (Band(), Band(None, 0), Band(2, 0)):
        check(q, k, v, grad, by_rule(band, 9, 9), arguments(band), bound)


@pytest.mark.parametrize("band", [Band(), Band(None, 0), Band(20, -3)], ids=str)
def test_dropout(band):
    sq, sk, p = 300, 40, 0.3
    q, k, _, _ = operands(sq, sk, 2)
    unit = torch.eye(sk)[:, None, None, :].expand(sk, B, 2, sk)
    settings = arguments(band, p=p)
    weights, _ = dense(q, k, unit, by_rule(band, sq, sk))
    dropped, _ = block_attention(q, k, unit, **settings)
    visible = weights > 0
    share = float((dropped[visible] > 0).double().mean())
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) / int(visible.sum())) ** 0.5
    # [sq, b, n, sk] -> [b, n, sq, sk]
    keep = (dropped > 0).permute(1, 2, 0, 3).double() / (1 - p)
    _, _, v, grad = operands(sq, sk, 2)
    check(q, k, v, grad, by_rule(band, sq, sk), settings, 1e-4, keep)
    other, _ = block_attention(q, k, unit, **arguments(band, p=p, seed=12))
    assert not torch.equal(other > 0, dropped > 0)


@pytest.mark.parametrize("p", [0.3, 1e-7, 1.0])
def test_keep_mask(p):
    device = torch.device("cpu")
    keep, scale = replayable_keep_mask(torch.Size((400, 500)), p, 5, device)
    again, _ = replayable_keep_mask(torch.Size((400, 500)), p, 5, device)
    assert torch.equal(keep, again)
    assert abs(float(keep.double().mean()) - (1 - p)) < 4 * (0.25 / keep.numel()) ** 0.5
    assert scale == (0.0 if p == 1.0 else pytest.approx(1 / (1 - p), rel=1e-4))


def test_no_random_stream_is_touched():
    q, k, v, _ = operands(5, 5, 2)
    state = torch.get_rng_state()
    block_attention(q, k, v, **arguments(p=0.5))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("spread", [1.5, 60.0], ids=["usual", "large scores"])
def test_merge_in_any_order(spread):
    """Parts of very different size, some of which see nothing: as good as all keys at once."""
    q, k, v, _ = operands(6, 20, 2, spread=spread)
    mask = random_mask(6, 20)
    mask[1, :, 2, :10] = True
    wanted, wanted_lse = dense(q, k, v, mask)
    cuts = [slice(0, 5), slice(5, 10), slice(10, 20)]
    for order in (cuts, cuts[::-1], [cuts[1], cuts[0], cuts[2]]):
        parts = [block_attention(q, k[c], v[c], **arguments(mask=mask[..., c])) for c in order]
        out, lse = (t.clone() for t in parts[0])
        for part in parts[1:]:
            out, lse = merge_attention(out, lse, *part)
        close(out, wanted, 3e-6)
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-6, atol=1e-5)


def test_merge_by_hand():
    """Weights 1 : 3 for the two parts, and a part without keys changes nothing."""
    out = torch.tensor([[[[2.0, 4.0]]]])
    other = torch.tensor([[[[6.0, 8.0]]]], dtype=torch.bfloat16)
    lse = torch.zeros(1, 1, 1)
    merged, merged_lse = merge_attention(out.clone(), lse.clone(), other, torch.tensor([[[3.0]]]).log())
    torch.testing.assert_close(merged, torch.tensor([[[[5.0, 7.0]]]]))
    torch.testing.assert_close(merged_lse, torch.tensor([[[4.0]]]).log())
    nothing = torch.full((1, 1, 1), NOTHING_VISIBLE)
    for pair in (
        merge_attention(out.clone(), lse.clone(), torch.zeros_like(out), nothing),
        merge_attention(torch.zeros_like(out), nothing.clone(), out, lse),
    ):
        assert torch.equal(pair[0], out)
        assert torch.equal(pair[1], lse)
    _, empty = merge_attention(torch.zeros_like(out), nothing.clone(), torch.zeros_like(out), nothing)
    assert torch.equal(empty, nothing)


def test_what_is_held_at_a_time_is_bounded_where_blocks_are_large() -> None:
    """32k keys, 64 heads on a device: a tile of scores stays below 256 MiB however many heads there are."""
    query, key = (torch.empty(32768, 1, heads, 1, device="meta") for heads in (64, 16))
    largest = 0
    with mock.patch.object(accelerator, "block_elements", lambda device: 1 << 26):
        for tile in block_attention_module._tiles(query, key, BlockShape(Band(), None, 1.0, 0.0, 0)):
            rows, keys, groups = (
                part.stop - part.start for part in (tile.stripe.rows, tile.stripe.keys, tile.groups)
            )
            largest = max(largest, rows * keys * groups * 4)
    assert 0 < 4 * largest <= 256 * 2**20
