"""Both attention paths against dense masked float64: windows, masks, groups, layouts, precisions."""

import pytest
import torch

from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.fusions import attention_masks
from megatron.core.fusions.fused_attention import fused_attention
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import attention_mask_func

S, B, HEADS, WIDTH = 13, 2, 4, 8
BACKENDS = [AttnBackend.fused, AttnBackend.unfused]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}


def attention(backend, mask_type=AttnMaskType.causal, groups=HEADS, layer_number=1, **fields):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=0.0,
        attention_backend=backend,
        **fields,
    )
    return DotProductAttention(config, layer_number, mask_type, "self")


def operands(groups=HEADS, dtype=torch.float32, length=S):
    torch.manual_seed(2)
    return tuple(
        (2 * torch.randn(length, B, heads, WIDTH)).to(dtype).requires_grad_()
        for heads in (HEADS, groups, groups)
    )


def dense(q, k, v, hidden, cap=None):
    """[s, b, n, d] -> [s, b, n*d], by the definition; scores go through ``cap * tanh(score / cap)``."""
    repeat = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
    scores = torch.einsum("qbnd,kbnd->bnqk", q, k) * q.shape[-1] ** -0.5
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    weights = torch.softmax(scores.masked_fill(hidden, -1e30), -1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, v).flatten(2)


def hidden_by_rule(left=None, right=0, length=S):
    """True unless i - left <= j <= i + right, written as two loops."""
    return torch.tensor(
        [[j > i + right or (left is not None and j < i - left) for j in range(length)] for i in range(length)]
    )


def check(layer, hidden, mask=None, groups=HEADS, dtype=torch.float32):
    narrow = operands(groups, dtype)
    wide = [t.detach().double().requires_grad_() for t in narrow]
    out, expected = layer(*narrow, mask), dense(*wide, hidden, layer.config.attn_logit_softcapping)
    assert out.dtype == dtype
    assert out.shape == (S, B, HEADS * WIDTH)
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype] * scale, rtol=0)
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, narrow, gradient)
    wanted = torch.autograd.grad(expected, wide, gradient.double())
    for f, w in zip(found, wanted, strict=True):
        size = max(1.0, float(w.abs().max()))
        torch.testing.assert_close(f.double(), w, atol=3 * TOLERANCE[dtype] * size, rtol=0)


@pytest.mark.parametrize("layout", ["SBH", "BSH"])
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("window", [None, (3, 0), (0, 0), (4, 4), (S - 2, 0), (S - 1, 0), (-1, 5), (2, -1)])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_window(backend, window, groups, layout):
    layer = attention(backend, groups=groups, window_size=window, attention_layout=layout)
    left = None if window is None or window[0] < 0 else window[0]
    check(layer, hidden_by_rule(left), groups=groups)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_window_that_looks_ahead_without_causality(backend):
    layer = attention(backend, AttnMaskType.no_mask, window_size=(2, 3))
    check(layer, hidden_by_rule(2, 3))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("window", [None, (4, 0)])
def test_explicit_mask_hides_on_top_of_causality(backend, window):
    # Two documents of 6 and 7 tokens that must not see each other, in the second sequence only.
    document = torch.tensor([[0] * S, [0] * 6 + [1] * 7])
    mask = document[:, None, :, None] != document[:, None, None, :]
    left = None if window is None else window[0]
    check(attention(backend, window_size=window), mask | hidden_by_rule(left), mask)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_padding_mask(backend):
    mask = (torch.arange(S) >= torch.tensor([[S], [5]]))[:, None, None, :].expand(B, 1, S, S)
    check(attention(backend, AttnMaskType.padding), mask, mask)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaling", [False, True], ids=["plain", "layer scaling"])
def test_half_precision(backend, dtype, scaling):
    fields = {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16, "params_dtype": dtype}
    layer = attention(backend, layer_number=7, apply_query_key_layer_scaling=scaling, **fields)
    check(layer, hidden_by_rule(), dtype=dtype)


@pytest.mark.parametrize("layout", ["SBH", "BSH"])
@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("window", [None, (3, 0)])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_soft_cap(backend, window, groups, layout):
    """Scores reach about 20 times their cap."""
    layer = attention(
        backend, groups=groups, window_size=window, attention_layout=layout, attn_logit_softcapping=1.5
    )
    check(layer, hidden_by_rule(window and window[0]), groups=groups)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaling", [False, True], ids=["plain", "layer scaling"])
def test_soft_cap_acts_on_scores_of_their_true_size(backend, dtype, scaling):
    fields = {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16, "params_dtype": dtype}
    layer = attention(
        backend,
        layer_number=7,
        apply_query_key_layer_scaling=scaling,
        attn_logit_softcapping=2.0,
        **fields,
    )
    check(layer, hidden_by_rule(), dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_soft_cap_leaves_masked_keys_masked(backend):
    document = torch.tensor([[0] * S, [0] * 6 + [1] * 7])
    mask = document[:, None, :, None] != document[:, None, None, :]
    check(attention(backend, attn_logit_softcapping=0.1), mask | hidden_by_rule(), mask)


def test_soft_cap_of_packed_sequences_and_of_fewer_queries_than_keys():
    layer = attention(AttnBackend.fused, attn_logit_softcapping=1.5)
    q, k, v = (t[:, :1] for t in operands())
    ends = torch.tensor([0, 4, S], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    packed = layer(q, k, v, None, packed_seq_params=params)
    apart = [layer(q[part], k[part], v[part], None) for part in (slice(0, 4), slice(4, S))]
    torch.testing.assert_close(packed, torch.cat(apart))
    # The last query sits at the last key.
    torch.testing.assert_close(layer(q[-3:], k, v, None), layer(q, k, v, None)[-3:])


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_dropout_behind_a_soft_cap(backend):
    """Zero queries weigh all keys alike: with values that name their key, outputs show which were dropped."""
    length, p = 256, 0.25
    model_parallel_cuda_manual_seed(3)
    layer = attention(backend, AttnMaskType.no_mask, attn_logit_softcapping=1.5)
    layer.attention_dropout = p
    q, k = torch.zeros(length, 1, HEADS, length), torch.zeros(length, 1, HEADS, length)
    v = torch.eye(length)[:, None, None].expand(length, 1, HEADS, length).contiguous().requires_grad_()
    out = layer(q, k, v, None).view(length, HEADS, length)
    kept = out > 0
    assert abs(float(kept.double().mean()) - (1 - p)) < 0.01
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / length / (1 - p)))
    out.sum().backward()
    # dV of key j is the sum of its weights over the queries, for every channel.
    wanted = out.detach().sum(0).t()[:, None, :, None].expand_as(v)
    torch.testing.assert_close(v.grad, wanted)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_softmax_scale(backend):
    q, k, v = operands()
    half = attention(backend, softmax_scale=0.5 * WIDTH**-0.5)
    torch.testing.assert_close(half(q, k, v, None), attention(backend)(q * 0.5, k, v, None))


def test_query_block_at_the_end_of_the_keys():
    """Fewer queries than keys: the last query sees all keys."""
    q, k, v = operands()
    for backend in BACKENDS:
        layer = attention(backend)
        torch.testing.assert_close(layer(q[-3:], k, v, None), layer(q, k, v, None)[-3:])


def test_value_heads_of_another_width():
    q, k, v = operands()
    narrow = v[..., :5]
    outs = [attention(backend)(q, k, narrow, None) for backend in BACKENDS]
    assert outs[0].shape == (S, B, HEADS * 5)
    torch.testing.assert_close(outs[0], outs[1])
    whole = attention(BACKENDS[0])(q, k, v, None).unflatten(-1, (HEADS, WIDTH))[..., :5].flatten(2)
    torch.testing.assert_close(outs[0], whole)


def test_hidden_rows_stay_numbers():
    mask = torch.ones(1, 1, S, S, dtype=torch.bool)
    for backend in BACKENDS:
        assert attention(backend)(*operands(), mask).isfinite().all()


def test_masks_are_built_once_per_shape():
    attention_masks.band_mask.cache_clear()
    for _ in range(3):
        for backend in BACKENDS:
            attention(backend, window_size=(3, 0))(*operands(), None)
    info = attention_masks.band_mask.cache_info()
    assert info.misses == 1
    assert info.hits >= 5


def test_layout_of_the_fused_operation():
    q, k, v = (t.flatten(2) for t in operands(2))
    sizes = {"num_heads": HEADS, "num_query_groups": 2, "softmax_scale": 0.3}
    sbh = fused_attention(q, k, v, layout="SBH", **sizes)
    bsh = fused_attention(*(t.transpose(0, 1).contiguous() for t in (q, k, v)), layout="BSH", **sizes)
    torch.testing.assert_close(bsh.transpose(0, 1), sbh)


def test_what_is_not_built_says_so():
    layer = attention(AttnBackend.fused)
    with pytest.raises(NotBuiltYetError, match="bias"):
        layer(*operands(), None, attention_bias=torch.zeros(1))


@pytest.mark.parametrize("fusion", [False, True])
def test_softmax_module(fusion):
    module = FusedScaleMaskSoftmax(
        False, True, AttnMaskType.causal, fusion, attention_mask_func, softmax_in_fp32=True, scale=0.5
    )
    scores = torch.randn(2, 2, 20, 20).bfloat16()
    assert module.is_kernel_available(None, *scores.shape) == fusion
    hidden = hidden_by_rule(length=20)
    expected = torch.softmax((scores.double() * 0.5).masked_fill(hidden, -1e30), -1)
    probs = module(scores, None)
    assert probs.dtype == torch.bfloat16
    torch.testing.assert_close(probs.double(), expected, atol=4e-3, rtol=0)


@pytest.mark.parametrize("window", [None, (2, 0)])
def test_packed_sequences_see_only_themselves(window):
    layer = attention(AttnBackend.auto, window_size=window).double()
    q, k, v = (t[:, :1].double() for t in operands())
    ends = torch.tensor([0, 4, S])
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends)
    found = layer(q, k, v, None, packed_seq_params=params)
    i, j = torch.arange(S)[:, None], torch.arange(S)
    hidden = (j > i) | ((i < 4) != (j < 4))
    if window is not None:
        hidden = hidden | (i - j > 2)
    torch.testing.assert_close(found, dense(q, k, v, hidden), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"qkv_format": "sbhd"}, ConfigError),
        ({"cu_seqlens_q_padded": torch.tensor([0, S])}, NotBuiltYetError),
        ({"cu_seqlens_kv_padded": torch.tensor([0, S])}, NotBuiltYetError),
    ],
)
def test_packed_sequences_of_another_form_are_refused(changes, error):
    ends = torch.tensor([0, S])
    fields = {"qkv_format": "thd", "cu_seqlens_q": ends, "cu_seqlens_kv": ends}
    q, k, v = (t[:, :1] for t in operands())
    with pytest.raises(error):
        attention(AttnBackend.auto)(q, k, v, None, packed_seq_params=PackedSeqParams(**fields | changes))
