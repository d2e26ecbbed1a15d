"""Packed sequences against one attention under a block-diagonal mask, written out in fp64."""

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.core.fusions.fused_attention import packed_attention
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

ENDS = [5, 6, 6, 17]


def operands(groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(17, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, groups, groups)
    ]


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, left: int) -> torch.Tensor:
    k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v))
    place = torch.arange(17)
    owner = torch.bucketize(place, torch.tensor(ENDS), right=True)
    distance = place.view(-1, 1) - place
    hidden = owner.view(-1, 1) != owner
    if causal:
        hidden = hidden | (distance < 0)
    if left >= 0:
        hidden = hidden | (distance > left)
    scores = torch.einsum("ind,jnd->nij", q, k) * 0.3
    return torch.einsum("nij,jnd->ind", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize(("causal", "left"), [(True, -1), (False, -1), (True, 3)])
def test_forward_and_backward(groups: int, causal: bool, left: int) -> None:
    leaves = operands(groups)
    out = packed_attention(
        *leaves, query_ends=ENDS, key_ends=ENDS, causal=causal, window=None if left < 0 else (left, 0),
        softmax_scale=0.3, dropout_p=0.0,
    )  # fmt: skip
    wanted = reference(*leaves, causal, left)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(wanted, leaves, grad)
    )


def layer() -> DotProductAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, attention_dropout=0.0,
        softmax_scale=0.3,
    )  # fmt: skip
    return DotProductAttention(config, 1, AttnMaskType.causal, "self")


def test_the_layer_takes_them() -> None:
    q, k, v = operands(2)
    bounds = torch.tensor([0, *ENDS], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    out = layer()(*(t.unsqueeze(1) for t in (q, k, v)), None, packed_seq_params=params)
    torch.testing.assert_close(out, reference(q, k, v, True, -1).flatten(1).unsqueeze(1))


def test_a_mask_beside_them_is_refused() -> None:
    bounds = torch.tensor([0, 4])
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    q, kv = torch.randn(4, 1, 4, 8), torch.randn(4, 1, 2, 8)
    with pytest.raises(ConfigError, match="with a mask"):
        layer()(q, kv, kv, torch.zeros(1, 1, 4, 4, dtype=torch.bool), packed_seq_params=params)
    with pytest.raises(ConfigError, match="2 rows"):
        two = [t.repeat(1, 2, 1, 1) for t in (q, kv, kv)]
        layer()(*two, None, packed_seq_params=params)
