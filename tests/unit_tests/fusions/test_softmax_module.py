"""The module form of the attention softmax, the masks it builds, and the bands of visible keys."""

import itertools

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.core.fusions import fused_softmax
from megatron.core.fusions.attention_masks import Band, covers
from megatron.core.fusions.fused_softmax import (
    FusedScaleMaskSoftmax,
    ScaledMaskedSoftmax,
    ScaledSoftmax,
    ScaledUpperTriangMaskedSoftmax,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.utils import attention_mask_func

B, N = 2, 2


def scores(sq, sk, dtype=torch.float32):
    return torch.randn(B, N, sq, sk, generator=torch.Generator().manual_seed(2)).to(dtype)


def hidden_after(sq, sk):
    """Keys after a query, whose last one stands at the last key."""
    return torch.tensor([[j > i + sk - sq for j in range(sk)] for i in range(sq)])


def expected(x, hidden, scale=1.0):
    wide = x.double() * scale
    return torch.softmax(wide if hidden is None else wide.masked_fill(hidden, -torch.inf), -1)


def softmax(kind=AttnMaskType.causal, fusion=False, fp16=False, bf16=False, wide=True, scale=None):
    return FusedScaleMaskSoftmax(fp16, bf16, kind, fusion, attention_mask_func, wide, scale)


def test_functions():
    x = scores(6, 6)
    hidden = torch.rand(B, 1, 6, 6, generator=torch.Generator().manual_seed(3)) < 0.4
    hidden[..., 0] = False
    found = ScaledMaskedSoftmax.apply(x, hidden, 0.7)
    torch.testing.assert_close(found.double(), expected(x, hidden, 0.7), rtol=1e-5, atol=1e-6)
    found = ScaledSoftmax.apply(x, 0.7)
    torch.testing.assert_close(found.double(), expected(x, None, 0.7), rtol=1e-5, atol=1e-6)
    rows = x.flatten(0, 1)
    found = ScaledUpperTriangMaskedSoftmax.apply(rows, 0.7)
    assert found.shape == rows.shape
    wanted = expected(rows, hidden_after(6, 6), 0.7)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


def test_functions_exponentiate_half_precision_in_fp32():
    x = scores(6, 6, torch.bfloat16)
    visible, rows = torch.zeros(B, 1, 6, 6, dtype=torch.bool), x.flatten(0, 1)
    causal = hidden_after(6, 6)
    for found, operand, hidden in (
        (ScaledMaskedSoftmax.apply(x, visible, 0.7), x, None),
        (ScaledSoftmax.apply(x, 0.7), x, None),
        (ScaledUpperTriangMaskedSoftmax.apply(rows, 0.7), rows, causal),
    ):
        wide = operand.float() * 0.7
        wide = wide if hidden is None else wide.masked_fill(hidden, -torch.inf)
        assert torch.equal(found, torch.softmax(wide, -1).bfloat16())


@pytest.mark.parametrize("fusion", [False, True])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize(("sq", "sk"), [(20, 20), (4, 20), (20, 24)])
def test_causal_module(sq, sk, dtype, name, fusion):
    x = scores(sq, sk, dtype)
    found = softmax(fusion=fusion, scale=0.5, **{name: True})(x, None)
    assert found.dtype == dtype
    wanted = expected(x, hidden_after(sq, sk), 0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=4e-3 if name == "bf16" else 5e-4)


def test_a_given_mask_is_the_only_one():
    x, hidden = scores(5, 5), hidden_after(5, 5).flip(0, 1)
    hidden[:, 2] = False
    for kind in (AttnMaskType.causal, AttnMaskType.padding):
        found = softmax(kind)(x.clone(), hidden)
        torch.testing.assert_close(found.double(), expected(x, hidden), rtol=1e-5, atol=1e-6)
    found = softmax(AttnMaskType.padding)(x.clone(), None)
    torch.testing.assert_close(found.double(), expected(x, None), rtol=1e-5, atol=1e-6)


def test_half_precision_is_widened_only_where_asked():
    x = scores(8, 8, torch.bfloat16)
    wide, narrow = (softmax(AttnMaskType.padding, bf16=True, wide=wide)(x, None) for wide in (True, False))
    assert torch.equal(wide, torch.softmax(x.float(), -1).bfloat16())
    assert torch.equal(narrow, torch.softmax(x, -1))


def test_kernel_is_available_for_the_original_shapes():
    module = softmax(fusion=True, fp16=True)
    assert module.is_kernel_available(None, 2, 2, 4, 20)
    assert module.is_kernel_available(None, 1, 4, 8, 4096)
    for b, n, sq, sk in [(2, 2, 4, 16), (2, 2, 4, 4100), (2, 2, 6, 20), (2, 2, 4, 22), (1, 2, 4, 20)]:
        assert not module.is_kernel_available(None, b, n, sq, sk)
    assert not softmax(fusion=True).is_kernel_available(None, 2, 2, 4, 20)
    assert not softmax(fp16=True).is_kernel_available(None, 2, 2, 4, 20)


def test_the_kernel_is_called_where_it_may_be(monkeypatch):
    calls = []

    def kernel(x, mask, scale, wide):
        calls.append((scale, wide, None if mask is None else mask.shape))
        return x

    monkeypatch.setattr(fused_softmax, "scaled_masked_softmax", kernel)
    for scale, wide in ((None, False), (0.25, True)):
        softmax(fusion=True, bf16=True, scale=scale, wide=wide)(scores(20, 20, torch.bfloat16), None)
    softmax(fusion=True, bf16=True)(scores(3, 3, torch.bfloat16), None)
    assert calls == [(1.0, False, (20, 20)), (0.25, True, (20, 20))]


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="fp16 and bf16 at once"):
        softmax(fp16=True, bf16=True)
    with pytest.raises(ConfigError, match="needs softmax_in_fp32"):
        softmax(scale=0.5, wide=False)


@pytest.mark.parametrize(
    ("sk", "rows"),
    # A block has 4 warps of 32 threads, one with two rows up to 128 keys; short rows take narrower warps.
    [(1, 256), (2, 128), (16, 16), (17, 8), (32, 8), (64, 8), (128, 8), (129, 4), (4096, 4)],
)
def test_rows_of_a_block(sk, rows):
    assert FusedScaleMaskSoftmax.get_batch_per_block(7, sk, 1, 1) == rows


def is_inside(band, i, j):
    return (band.left is None or j >= i - band.left) and (band.right is None or j <= i + band.right)


@pytest.mark.parametrize(("sq", "sk"), list(itertools.product((1, 2, 5), repeat=2)))
def test_bands_against_lists_of_pairs(sq, sk):
    limits = [None, *range(-7, 8)]
    for left, right in itertools.product(limits, limits):
        band = Band(left, right)
        seen = [place for place in itertools.product(range(sq), range(sk)) if is_inside(band, *place)]
        if left is None or right is None or left + right >= 0:  # else it is empty by itself
            hides = band.masks_all(sq, sk)
            assert hides <= (not seen)
            if left is None or right is None:
                assert hides == (not seen)
        trimmed, block = band.trimmed(sq, sk), list(itertools.product(range(sq), range(sk)))
        assert trimmed.left in (left, None) and trimmed.right in (right, None)
        assert (trimmed.left is None) == (left is None or all(j >= i - left for i, j in block))
        assert (trimmed.right is None) == (right is None or all(j <= i + right for i, j in block))
        further = band.moved(3, 1)
        for i, j in block:
            whole = (left is None or j + 1 >= i + 3 - left) and (right is None or j + 1 <= i + 3 + right)
            assert is_inside(further, i, j) == whole
        assert band.is_causal(sq, sk) == (left is None and right == 0 and sq == sk)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_window_that_masks_no_score_is_recognised(length, causal):
    for window in itertools.product(range(-1, 7), repeat=2):
        left, right = window
        hides = any(
            (0 <= left < i - j) or (0 <= right < j - i)
            for i, j in itertools.product(range(length), repeat=2)
            if not causal or j <= i
        )
        assert covers(window, length, length, causal) == (not hides)
