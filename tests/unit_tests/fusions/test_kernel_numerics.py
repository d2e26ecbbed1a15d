"""Replaceable functions against plain float64 formulas, forward and backward, in every precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron.core import accelerator
from megatron.core.fusions.embeddings import embedding_lookup, rotary
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add
from megatron.core.fusions.fused_bias_geglu import (
    bias_geglu,
    bias_geglu_back,
    bias_geglu_impl,
    gated_gelu,
    geglu,
    geglu_back,
)
from megatron.core.fusions.fused_bias_gelu import bias_gelu, bias_gelu_back, bias_gelu_impl
from megatron.core.fusions.fused_bias_swiglu import (
    bias_swiglu,
    bias_swiglu_back,
    bias_swiglu_impl,
    swiglu,
    swiglu_back,
    weighted_bias_swiglu_impl,
)
from megatron.core.fusions.fused_cross_entropy import cross_entropy, fused_vocab_parallel_cross_entropy
from megatron.core.fusions.fused_layer_norm import layer_norm, rms_norm
from megatron.core.fusions.fused_softmax import scaled_masked_softmax
from tests.unit_tests.test_public_names import problems_in

# Largest error relative to the largest reference value.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
DTYPES = list(TOLERANCE)
S, B, H = 5, 3, 16


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def erf_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def silu(x):
    return x / (1 + torch.exp(-x))


def layer_norm64(x, weight, bias, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def rms_norm64(x, weight, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate64(t, angles, interleaved):
    """Multiplies the pair (a, b), read as a + ib, by e^(i angle)."""
    first, second = (t[..., 0::2], t[..., 1::2]) if interleaved else t.chunk(2, -1)
    turned = torch.complex(first, second) * torch.exp(1j * angles)
    if interleaved:
        return torch.stack((turned.real, turned.imag), -1).flatten(-2)
    return torch.cat((turned.real, turned.imag), -1)


def softmax64(scores, hidden, scale):
    return torch.softmax((scores * scale).masked_fill(hidden, -10000.0), -1)


ANGLES = torch.rand(S, 1, 1, H // 2, dtype=torch.float64) * 6
HIDDEN = torch.ones(S, S, dtype=torch.bool).triu(1)


def rotary_at(interleaved):
    both = ANGLES.repeat_interleave(2, -1) if interleaved else torch.cat((ANGLES, ANGLES), -1)
    return lambda t: rotary(t, both.cos().to(t.dtype), both.sin().to(t.dtype), interleaved)


def halves(y):
    return y.chunk(2, -1)


# name -> (function, float64 formula, operands)
KERNELS = {
    "layer_norm": (
        lambda x, w, b: layer_norm(x, w, b, 1e-5),
        layer_norm64,
        lambda: (randn(S, B, H) * 3 + 1, randn(H), randn(H)),
    ),
    "rms_norm": (lambda x, w: rms_norm(x, w, 1e-6), rms_norm64, lambda: (randn(S, B, H) * 3 + 1, randn(H))),
    "bias_gelu": (bias_gelu_impl, lambda x, b: tanh_gelu(x + b), lambda: (randn(S, B, H) * 2, randn(H))),
    "geglu erf": (
        lambda y: gated_gelu(y, "none", False),
        lambda y: erf_gelu(halves(y)[0]) * halves(y)[1],
        lambda: (randn(S, B, H),),
    ),
    "geglu gate last": (
        lambda y: gated_gelu(y, "none", True),
        lambda y: halves(y)[0] * erf_gelu(halves(y)[1]),
        lambda: (randn(S, B, H),),
    ),
    "bias_geglu": (
        bias_geglu_impl,
        lambda y, b: tanh_gelu(halves(y + b)[0]) * halves(y + b)[1],
        lambda: (randn(S, B, H), randn(H)),
    ),
    "swiglu": (swiglu, lambda y: silu(halves(y)[0]) * halves(y)[1], lambda: (randn(S, B, H),)),
    "bias_swiglu": (
        bias_swiglu_impl,
        lambda y, b: silu(halves(y + b)[0]) * halves(y + b)[1],
        lambda: (randn(S, B, H), randn(H)),
    ),
    "weighted_swiglu": (
        lambda y, w: weighted_bias_swiglu_impl(y, None, w),
        lambda y, w: silu(halves(y)[0]) * halves(y)[1] * w,
        lambda: (randn(S, H), randn(S, 1)),
    ),
    "rotary": (rotary_at(False), lambda t: rotate64(t, ANGLES, False), lambda: (randn(S, B, 2, H),)),
    "rotary interleaved": (
        rotary_at(True),
        lambda t: rotate64(t, ANGLES, True),
        lambda: (randn(S, B, 2, H),),
    ),
    "softmax": (
        lambda x: scaled_masked_softmax(x, HIDDEN, 0.7, True),
        lambda x: softmax64(x, HIDDEN, 0.7),
        lambda: (randn(B, 2, S, S) * 3,),
    ),
    "bias_dropout_add": (
        lambda x, b, r: bias_dropout_add(x, b, r, 0.5, False),
        lambda x, b, r: r + x + b,
        lambda: (randn(S, B, H), randn(H), randn(S, B, H)),
    ),
}


def relative_error(found, expected):
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.fixture(params=[1, 1 << 17], ids=["row by row", "at once"], autouse=True)
def block_size(request, monkeypatch):
    """Functions that work in blocks must not care how large these are."""
    monkeypatch.setattr(accelerator, "block_elements", lambda device: request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_against_formula(name, dtype):
    torch.manual_seed(list(KERNELS).index(name))
    function, formula, make = KERNELS[name]
    narrow = [operand.to(dtype).requires_grad_() for operand in make()]
    wide = [operand.detach().double().requires_grad_() for operand in narrow]
    out, expected = function(*narrow), formula(*wide)
    assert out.dtype == dtype
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    gradient = torch.randn_like(out)
    found = torch.autograd.grad(out, narrow, gradient)
    wanted = torch.autograd.grad(expected, wide, gradient.double())
    for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
        assert f.dtype == dtype
        assert relative_error(f, w) <= 2 * TOLERANCE[dtype], f"gradient of operand {i}"


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_norm_of_wide_stream_returns_weight_dtype(norm):
    x, weight = randn(S, H).float(), torch.randn(H).bfloat16()
    more = (torch.zeros(H).bfloat16(),) if norm is layer_norm else ()
    out = norm(x, weight, *more, 1e-5)
    assert out.dtype == torch.bfloat16
    formula = layer_norm64 if norm is layer_norm else rms_norm64
    more64 = (torch.zeros(H).double(),) if norm is layer_norm else ()
    assert relative_error(out, formula(x.double(), weight.double(), *more64, 1e-5)) < 1e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(dtype, smoothing):
    torch.manual_seed(3)
    columns = 37
    logits = (randn(S, B, columns) * 4).to(dtype).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    target = torch.randint(columns, (S, B))
    loss = cross_entropy(logits, target, smoothing)
    assert loss.dtype == torch.float32
    log_probs = F.log_softmax(wide, -1)
    picked = log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    rate = smoothing * columns / (columns - 1)
    expected = -(1 - rate) * picked - rate * log_probs.mean(-1)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
    scale = torch.rand(S, B)
    (found,) = torch.autograd.grad(loss, logits, scale)
    (wanted,) = torch.autograd.grad(expected, wide, scale.double())
    assert found.dtype == dtype
    assert relative_error(found, wanted) <= 2 * TOLERANCE[dtype]


def test_cross_entropy_ignores_negative_targets():
    logits = torch.randn(4, 9, requires_grad=True)
    loss = fused_vocab_parallel_cross_entropy(logits, torch.tensor([1, -1, -100, 3]), None)
    loss.sum().backward()
    assert loss[1] == loss[2] == 0
    assert logits.grad[1:3].abs().max() == 0
    assert logits.grad[0].abs().min() > 0


def test_cross_entropy_keeps_the_logits_and_nothing_of_their_size():
    logits = torch.randn(64, 300, requires_grad=True)
    loss = cross_entropy(logits, torch.randint(300, (64,)), 0.0)
    saved = [t for t in _saved_tensors(loss) if t.numel() >= logits.numel()]
    assert [t.data_ptr() for t in saved] == [logits.data_ptr()]


def _saved_tensors(loss):
    node = loss.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    return node.saved_tensors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_sums_frequent_ids_without_losing_any(dtype):
    table = torch.zeros(4, 2, dtype=dtype, requires_grad=True)
    ids = torch.tensor([[1] * 2000 + [2]])
    embedding_lookup(ids, table).backward(torch.full((1, 2001, 2), 1.0, dtype=dtype))
    assert table.grad.dtype == dtype
    # 2000 is a number of all three dtypes; a bf16 running sum would stop at 256.
    assert table.grad.tolist() == [[0, 0], [2000, 2000], [1, 1], [0, 0]]


def test_public_gradient_helpers():
    y, bias, g = randn(4, H), randn(H), randn(4, H // 2)
    for forward, backward in (
        (swiglu, swiglu_back),
        (geglu, geglu_back),
        (lambda y: bias_swiglu(y, bias), lambda g, y: bias_swiglu_back(g, y, bias)),
        (lambda y: bias_geglu(bias, y), lambda g, y: bias_geglu_back(g, y, bias)),
    ):
        leaf = y.clone().requires_grad_()
        (expected,) = torch.autograd.grad(forward(leaf), leaf, g)
        torch.testing.assert_close(backward(g, y), expected)
    leaf, g = y.clone().requires_grad_(), randn(4, H)
    (expected,) = torch.autograd.grad(bias_gelu(bias, leaf), leaf, g)
    torch.testing.assert_close(bias_gelu_back(g, bias, y), expected)
    torch.testing.assert_close(bias_gelu(bias, y), tanh_gelu(y + bias))


def test_defaults_are_the_original_ones() -> None:
    assert problems_in("megatron.core.fusions") == []
