"""Autograd forms, derivative functions, norm modules and the end of a sub-layer, against float64 formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from megatron.core.errors import ConfigError
from megatron.core.fusions import fused_bias_geglu as geglus
from megatron.core.fusions import fused_bias_swiglu as swiglus
from megatron.core.fusions.fused_bias_dropout import bias_dropout_add, get_bias_dropout_add
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm, FusedRMSNorm

ROWS, WIDTH = 7, 6


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def silu_gated(y):
    gate, up = y[..., :WIDTH], y[..., WIDTH:]
    return gate / (1 + torch.exp(-gate)) * up


def gelu_gated(y):
    gate, up = y[..., :WIDTH], y[..., WIDTH:]
    return F.gelu(gate, approximate="tanh") * up


def gradients(function, *operands):
    """The value, and the gradients of the operands for a fixed gradient of the value."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, drawn(*out.shape, seed=9, dtype=out.dtype))
    return [out.detach(), *grads]


Y, BIAS, WEIGHTS = drawn(ROWS, 2 * WIDTH), drawn(2 * WIDTH, seed=1), drawn(ROWS, 1, seed=2)
G = drawn(ROWS, WIDTH, seed=9)


@pytest.mark.parametrize(
    ("function", "formula", "operands"),
    [
        (lambda y: swiglus.SwiGLUFunction.apply(y, False), silu_gated, (Y,)),
        (
            lambda y, b: swiglus.BiasSwiGLUFunction.apply(y, b, False),
            lambda y, b: silu_gated(y + b),
            (Y, BIAS),
        ),
        (
            lambda y, w: swiglus.WeightedSwiGLUFunction.apply(y, w, False),
            lambda y, w: silu_gated(y) * w,
            (Y, WEIGHTS),
        ),
        (
            lambda y, w: swiglus.weighted_bias_swiglu_impl(y, None, w),
            lambda y, w: silu_gated(y) * w,
            (Y, WEIGHTS),
        ),
        (swiglus.bias_swiglu, lambda y, b: silu_gated(y + b), (Y, BIAS)),
        (geglus.GeGLUFunction.apply, gelu_gated, (Y,)),
        (geglus.BiasGeGLUFunction.apply, lambda y, b: gelu_gated(y + b), (Y, BIAS)),
        (geglus.bias_geglu, lambda y, b: gelu_gated(y + b), (Y, BIAS)),
    ],
)
def test_functions_and_their_gradients(function, formula, operands):
    for found, wanted in zip(gradients(function, *operands), gradients(formula, *operands), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("function", "formula", "operands"),
    [
        (swiglus.swiglu_back, silu_gated, (Y,)),
        (swiglus.bias_swiglu_back, lambda y, b: silu_gated(y + b), (Y, BIAS)),
        (geglus.geglu_back, gelu_gated, (Y,)),
        (geglus.bias_geglu_back, lambda y, b: gelu_gated(y + b), (Y, BIAS)),
    ],
)
def test_derivative_functions(function, formula, operands):
    wanted = gradients(formula, *operands)[1]
    torch.testing.assert_close(function(G, *operands), wanted, rtol=1e-9, atol=1e-11)


def test_gradients_of_weights_of_another_precision():
    weights = WEIGHTS.float()
    found = swiglus.weighted_swiglu_back(G.bfloat16(), Y.bfloat16(), weights)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32]
    assert [t.shape for t in found] == [Y.shape, WEIGHTS.shape]
    rounded = (Y.bfloat16().double(), weights.double())
    leaves = [t.clone().requires_grad_() for t in rounded]
    wanted = torch.autograd.grad(silu_gated(leaves[0]) * leaves[1], leaves, G.bfloat16().double())
    for mine, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=3e-2, atol=3e-2)


def test_storage_in_fp8_and_biases_of_experts_are_refused():
    for call in (
        lambda: swiglus.SwiGLUFunction.apply(Y, True),
        lambda: swiglus.BiasSwiGLUFunction.apply(Y, BIAS, True),
        lambda: swiglus.WeightedSwiGLUFunction.apply(Y, WEIGHTS, True),
        lambda: swiglus.bias_swiglu_impl(Y, BIAS, True),
        lambda: swiglus.weighted_bias_swiglu_impl(Y, None, WEIGHTS, True),
    ):
        with pytest.raises(ConfigError, match="no fp8 storage"):
            call()
    with pytest.raises(ConfigError, match="takes no bias"):
        swiglus.weighted_bias_swiglu_impl(Y, BIAS, WEIGHTS)


@pytest.mark.parametrize("fused", [False, True])
def test_end_of_a_sub_layer(fused):
    x, bias, residual = drawn(40, 3, 50), drawn(50, seed=1), drawn(40, 3, 50, seed=2)
    inference, training = (get_bias_dropout_add(is_on, fused) for is_on in (False, True))
    assert torch.equal(inference((x, bias), residual, 0.4), residual + (x + bias))
    assert torch.equal(inference((x, None), residual, 0.4), residual + x)
    assert torch.equal(training((x, bias), residual, 0.0), residual + (x + bias))
    dropped = training((x, bias), residual, 0.4) - residual
    kept = dropped.abs() > 1e-9
    assert 0.55 < float(kept.double().mean()) < 0.65
    # The probability is a multiple of 2^-16 or finer.
    torch.testing.assert_close(dropped[kept], ((x + bias) / 0.6)[kept], rtol=1e-4, atol=1e-6)
    state = torch.get_rng_state()
    bias_dropout_add(x, bias, residual, 0.0, True)
    bias_dropout_add(x, bias, residual, 0.4, False)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn


def settings(zero_centered=False, sequence_parallel=False):
    return SimpleNamespace(
        layernorm_zero_centered_gamma=zero_centered,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float64,
        use_cpu_initialization=True,
        init_model_with_meta_device=False,
    )


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("norm", [FusedLayerNorm, FusedRMSNorm])
def test_new_norms_scale_by_one(norm, zero_centered):
    x = 3 * drawn(4, 2, WIDTH) + 1
    module = norm(settings(zero_centered), WIDTH, eps=1e-3)
    if norm is FusedLayerNorm:
        wanted = F.layer_norm(x, (WIDTH,), eps=1e-3)
    else:
        wanted = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(module(x), wanted)
    assert torch.equal(module.weight.data, torch.full_like(module.weight, 0.0 if zero_centered else 1.0))
    with torch.no_grad():
        module.weight.add_(0.5)
    torch.testing.assert_close(module(x), 1.5 * wanted)


def test_a_norm_may_be_centred_by_its_own_argument():
    module = FusedLayerNorm(settings(), WIDTH, zero_centered_gamma=True)
    assert (
        module.eps == 1e-5
        and not module.weight.any()
        and torch.equal(module.scale(), torch.ones(WIDTH).double())
    )
    assert not module.weight.sequence_parallel and not module.bias.sequence_parallel
    split = FusedLayerNorm(settings(sequence_parallel=True), WIDTH)
    assert split.weight.sequence_parallel and split.bias.sequence_parallel


def test_a_norm_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="is a LayerNorm, not a RMSNorm"):
        FusedLayerNorm(settings(), WIDTH, normalization="RMSNorm")
