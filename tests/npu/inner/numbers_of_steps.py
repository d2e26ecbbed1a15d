"""Level 2, more than one call at a time: dropout, twenty steps of AdamW, switches, whole layers."""

import pytest
import torch

import megatron_npu
from megatron.core import overrides, parallel_state
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.fusions.attention_masks import Band
from megatron.core.fusions.block_attention import (
    block_attention,
    block_attention_backward,
    merge_attention,
)
from megatron.core.fusions.fused_attention import fused_attention
from megatron.core.fusions.fused_softmax import scaled_masked_softmax
from megatron.core.optimizer.adamw import Adam
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_npu import activation
from megatron_npu.registry import replacements
from megatron_npu.virtual.kernels import KERNELS
from megatron_npu.virtual.kernels.attention import Draw
from tests.npu.cpu_kernels import install_on_cpu

install_on_cpu()


@pytest.fixture(autouse=True)
def active(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(overrides.DISABLE_VARIABLE, raising=False)
    megatron_npu.activate()
    yield
    overrides.enable_all()


@pytest.fixture(scope="module")
def one_rank():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def attention_layer(dropout: float, **fields) -> DotProductAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, attention_dropout=dropout, **fields
    )
    return DotProductAttention(config, 1, AttnMaskType.causal, "self")


def operands(s: int = 16, d: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(s, 2, 4, d, generator=generator, requires_grad=True) for _ in range(3)]


def test_attention_drops_only_while_training(one_rank, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, qkv = attention_layer(0.5), operands()
    plain = attention_layer(0.0)(*qkv, None)
    before = Draw.offset
    torch.testing.assert_close(layer.eval()(*qkv, None), plain, rtol=0, atol=0)
    assert Draw.offset == before
    dropped = layer.train()(*qkv, None)
    assert Draw.offset == before + 10
    assert not torch.allclose(dropped, plain)


def test_attention_with_dropout_is_differentiated_with_the_mask_it_drew(one_rank) -> None:
    """The output is linear in the values: its change along a direction is the gradient times that."""
    q, k, v = (t.detach().flatten(2) for t in operands())
    direction = torch.randn_like(v)

    def output(values: torch.Tensor) -> torch.Tensor:
        Draw.offset = 40
        return fused_attention(q, k, values, num_heads=4, num_query_groups=4, dropout_p=0.3).sum()

    leaf = v.clone().requires_grad_()
    output(leaf).backward()
    slope = output(v + direction) - output(v)
    torch.testing.assert_close((leaf.grad * direction).sum(), slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_soft_cap_goes_to_the_default(one_rank, packed: bool) -> None:
    """The operator has no cap: its result would not be that of the definition."""
    cap, layer = 0.5, attention_layer(0.0, attn_logit_softcapping=0.5)
    qkv = [t[:, :1] for t in operands()]
    ends = torch.tensor([0, 16], dtype=torch.int32)
    params = PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends) if packed else None
    found = layer(*qkv, None, packed_seq_params=params)
    wide = [t.detach().double().requires_grad_() for t in qkv]
    scores = cap * torch.tanh(torch.einsum("qbnd,kbnd->bnqk", *wide[:2]) / 4 / cap)
    scores = scores.masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)
    wanted = torch.einsum("bnqk,kbnd->qbnd", scores.softmax(-1), wide[2]).flatten(2)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    direction = torch.linspace(-1, 1, found.numel()).view_as(found)
    gradients = torch.autograd.grad(found, qkv, direction)
    for f, w in zip(gradients, torch.autograd.grad(wanted, wide, direction.double()), strict=True):
        torch.testing.assert_close(f.double(), w, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["SBH", "BSH"])
@pytest.mark.parametrize("groups", [4, 2])
def test_a_window_equals_a_written_out_reference(layout: str, groups: int) -> None:
    """``--pre 64 --next 0`` below and above 2048 tokens, against scores written out in fp64."""
    for s in (96, 2112):
        generator = torch.Generator().manual_seed(s)
        q = torch.randn(s, 4, 16, generator=generator)
        k, v = (torch.randn(s, groups, 16, generator=generator) for _ in range(2))

        def flat(t: torch.Tensor) -> torch.Tensor:
            t = t.flatten(1).unsqueeze(1)
            return t if layout == "SBH" else t.transpose(0, 1).contiguous()

        out = fused_attention(
            flat(q), flat(k), flat(v), num_heads=4, num_query_groups=groups, layout=layout, window=(64, 0)
        )
        found = (out if layout == "SBH" else out.transpose(0, 1)).view(s, 4, 16)
        place = torch.arange(s)
        distance = place.view(-1, 1) - place
        for head in range(4):
            scores = q[:, head].double() @ k[:, head * groups // 4].double().t()
            scores[(distance < 0) | (distance > 64)] = -torch.inf
            wanted = scores.softmax(-1) @ v[:, head * groups // 4].double()
            torch.testing.assert_close(found[:, head].double(), wanted, rtol=1e-5, atol=1e-5)


def test_blocks_of_a_ring_give_the_whole() -> None:
    """Three blocks of keys, one of them before all queries, one causal, one after: as in a ring."""
    q, k, v = (t.detach() for t in operands(24))
    q = q[8:16]
    bands = (Band(None, 8), Band(None, 0), Band(None, -8))
    fixed = dict(attention_mask=None, softmax_scale=0.25, dropout_p=0.0, dropout_seed=0)
    blocks = [slice(start, start + 8) for start in (0, 8, 16)]
    parts = [
        block_attention(q, k[b], v[b], band=band, **fixed) for b, band in zip(blocks, bands, strict=True)
    ]
    out, lse = parts[0]
    for part in parts[1:]:
        out, lse = merge_attention(out.float(), lse, *part)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    scores = torch.einsum("ibnd,jbnd->bnij", *leaves[:2]) * 0.25
    hidden = torch.arange(24) > torch.arange(8, 16).view(-1, 1)
    wanted = torch.einsum("bnij,jbnd->ibnd", scores.masked_fill(hidden, -torch.inf).softmax(-1), leaves[2])
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4))
    wanted_q, wanted_k, wanted_v = torch.autograd.grad(wanted, leaves, grad)
    shares = [
        block_attention_backward(grad, q, k[b], v[b], out, lse, band=band, **fixed)
        for b, band in zip(blocks, bands, strict=True)
    ]
    torch.testing.assert_close(sum(share[0] for share in shares), wanted_q, rtol=1e-4, atol=1e-5)
    for place, whole in ((1, wanted_k), (2, wanted_v)):
        torch.testing.assert_close(torch.cat([s[place] for s in shares]), whole, rtol=1e-4, atol=1e-5)


def test_twenty_steps_of_adamw() -> None:
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(200, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizers = Adam([ours], **options), torch.optim.AdamW([theirs], foreach=False, **options)
    for _ in range(20):
        ours.grad = torch.randn(200, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            optimizers[0].state[ours][name], optimizers[1].state[theirs][name], rtol=1e-6, atol=1e-7
        )


def test_a_replacement_can_be_switched_off_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    swiglu = replacements()["megatron.core.fusions.fused_bias_swiglu.swiglu"]
    monkeypatch.setattr(swiglu, "function", lambda y: calls.append(1) or KERNELS["npu_swiglu"](y))
    y = torch.randn(3, 8)
    fused_bias_swiglu.swiglu(y)
    overrides.disable("swiglu")
    fused_bias_swiglu.swiglu(y)
    assert calls == [1]
    overrides.enable_all()
    monkeypatch.setenv(overrides.DISABLE_VARIABLE, "swiglu")
    overrides.disable([])
    fused_bias_swiglu.swiglu(y)
    assert calls == [1]


def test_a_call_beyond_the_limits_goes_to_the_default() -> None:
    softmax = replacements()["megatron.core.fusions.fused_softmax.scaled_masked_softmax"]
    softmax.served_by_default.clear()
    scores = torch.randn(1, 2, 7, 9)
    torch.testing.assert_close(scaled_masked_softmax(scores, None, 2.0, False), (2.0 * scores).softmax(-1))
    scaled_masked_softmax(scores, torch.zeros(7, 9, dtype=torch.bool), 1.0, False)
    scaled_masked_softmax(scores.double(), None, 1.0, False)
    assert dict(softmax.served_by_default) == {
        "no mask": 1,
        "sides that are not multiples of 32 in 32..4096": 1,
        "dtype float64": 1,
    }


def test_a_910b_runs_all_but_the_overflow_flag() -> None:
    idle = {
        row.point.rpartition(".")[2]
        for row in activation.table()
        if row.serves != "default" and not row.active
    }
    assert idle == {"watch_overflow", "unscale_and_check"}
