"""Cross attention, and small functions of layers, against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron.core.errors import ConfigError
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import utils
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.transformer_config import TransformerConfig

SQ, SK, B, H, N = 5, 7, 2, 24, 4
PARTS = CrossAttentionSubmodules(
    linear_q=ColumnParallelLinear,
    linear_kv=ColumnParallelLinear,
    core_attention=DotProductAttention,
    linear_proj=RowParallelLinear,
)


def cross_attention(**fields):
    model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=N,
        attention_dropout=0.0,
        init_method_std=0.4,
        **fields,
    )
    return CrossAttention(config, PARTS, 1, AttnMaskType.padding)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_cross_attention(bias, masked):
    layer = cross_attention(add_bias_linear=bias)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x, other = torch.randn(SQ, B, H), torch.randn(SK, B, H)
    hidden = torch.zeros(B, 1, SQ, SK, dtype=torch.bool)
    if masked:
        hidden[0, :, :, 4:] = True
    found, found_bias = layer(x, hidden, key_value_states=other)

    def linear(module, t):
        return F.linear(t, module.weight, module.bias if bias else None)

    # Rows of linear_kv by head: its key, then its value.
    q = linear(layer.linear_q, x).view(SQ, B, N, H // N).permute(1, 2, 0, 3)
    kv = linear(layer.linear_kv, other).view(SK, B, N, 2, H // N).permute(3, 1, 2, 0, 4)
    scores = (q @ kv[0].transpose(-1, -2) / math.sqrt(H // N)).masked_fill(hidden, -torch.inf)
    context = (scores.softmax(-1) @ kv[1]).permute(2, 0, 1, 3).reshape(SQ, B, H)
    torch.testing.assert_close(found, context @ layer.linear_proj.weight.t(), rtol=1e-4, atol=1e-5)
    assert (found_bias is layer.linear_proj.bias) if bias else found_bias is None


def test_cross_attention_of_grouped_queries_is_refused():
    with pytest.raises(ConfigError, match="takes no grouped queries"):
        cross_attention(num_query_groups=2)


@pytest.mark.parametrize("drawn", [True, False])
def test_a_linear_layer(drawn):
    layer = utils.get_linear_layer(3, 5, lambda weight: torch.nn.init.constant_(weight, 7.0), drawn)
    assert layer.weight.shape == (5, 3) and not layer.bias.any()
    assert bool((layer.weight == 7.0).all()) == drawn


def test_the_default_is_to_draw():
    assert bool((utils.get_linear_layer(2, 2, lambda w: torch.nn.init.constant_(w, 7.0)).weight == 7.0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activations(dtype):
    x = torch.linspace(-4, 4, 50, dtype=torch.float64).to(dtype)
    wide = x.double()
    exact = 0.5 * wide * (1 + torch.erf(wide / 2**0.5))
    tanh = 0.5 * wide * (1 + torch.tanh((2 / math.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for function, formula in ((utils.erf_gelu, exact), (utils.gelu_impl, tanh), (utils.openai_gelu, tanh)):
        assert function(x).dtype == dtype
        torch.testing.assert_close(function(x).double(), formula, rtol=tolerance, atol=tolerance)


def test_masks():
    assert utils.get_default_causal_mask(3).tolist() == [
        [False, True, True],
        [False, False, True],
        [False] * 3,
    ]
    scores = torch.ones(2, 2)
    assert utils.attention_mask_func(scores, torch.tensor([[True, False]])).tolist() == [[-1e4, 1.0]] * 2


def test_a_copy_of_another_stage_is_shared():
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert param_is_not_shared(parameter)
    for shared in (True, False):
        parameter.shared = shared
        assert param_is_not_shared(parameter) is not shared
