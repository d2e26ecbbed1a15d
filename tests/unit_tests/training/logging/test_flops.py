"""Counted operations against torch's own counter on a real model."""

from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.logging.step_log import num_floating_point_operations


def shape(**changes):
    return Namespace(
        **(
            dict(
                seq_length=16,
                hidden_size=32,
                num_layers=2,
                num_attention_heads=4,
                num_query_groups=1,
                group_query_attention=False,
                kv_channels=8,
                ffn_hidden_size=128,
                swiglu=False,
                glu_gate_last=False,
                padded_vocab_size=64,
            )
            | changes
        )
    )


def widths_of_layer(args, layer, tokens):
    """(rows, inner width) of each MLP of a layer; every expert has its share of the tokens' copies."""
    experts = getattr(args, "num_experts", None)
    if not experts or layer % args.moe_layer_freq:
        return [(tokens, args.ffn_hidden_size)]
    routed = [(tokens * args.moe_router_topk // experts, args.moe_ffn_hidden_size)] * experts
    return [*routed, (tokens, args.moe_shared_expert_intermediate_size)]


def torch_count(args, batch):
    """Operations of forward and backward of the same products, written as bare matrix products."""
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    heads, d, s, h = args.num_attention_heads, args.kv_channels, args.seq_length, args.hidden_size

    def weight(rows, columns):
        return torch.randn(rows, columns, requires_grad=True)

    with FlopCounterMode(display=False) as counter:
        x = torch.randn(batch * s, h, requires_grad=True)
        total = (x @ weight(h, args.padded_vocab_size)).sum()
        for layer in range(args.num_layers):
            total = total + (x @ weight(h, (heads + 2 * groups) * d)).sum()
            q, k, v = (torch.randn(batch * heads, s, d, requires_grad=True) for _ in range(3))
            context = torch.bmm(torch.bmm(q, k.transpose(1, 2)), v)
            total = total + context.sum()
            total = (
                total + (torch.randn(batch * s, heads * d, requires_grad=True) @ weight(heads * d, h)).sum()
            )
            for rows, width in widths_of_layer(args, layer, batch * s):
                inner = torch.randn(rows, width, requires_grad=True)
                total = total + (x[:rows] @ weight(h, width * (2 if args.swiglu else 1))).sum()
                total = total + (inner @ weight(width, h)).sum()
        total.backward()
    # Causal attention counts half of its square: take the other half off.
    return counter.get_total_flops() - args.num_layers * 6 * batch * heads * s * s * d


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"swiglu": True, "ffn_hidden_size": 96},
        {"group_query_attention": True, "num_query_groups": 2},
        {"kv_channels": 12},
        {
            "swiglu": True,
            "num_experts": 4,
            "moe_layer_freq": 2,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": 24,
            "moe_shared_expert_intermediate_size": 40,
        },
    ],
)
def test_formula_counts_every_product(changes):
    args = shape(**changes)
    assert num_floating_point_operations(args, 3) == pytest.approx(torch_count(args, 3), rel=1e-9)


@pytest.mark.parametrize("rank_q", [None, 24])
def test_latent_attention_counts_what_its_modules_compute(rank_q):
    """Torch counts whole squares of causal attention, and neither norms nor rotations."""
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        q_lora_rank=rank_q,
        kv_lora_rank=20,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=6,
        add_bias_linear=False,
        attention_backend=AttnBackend.unfused,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    latent = {
        field: getattr(config, field)
        for field in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
    }
    args = shape(num_layers=1, multi_latent_attention=True, **latent)
    batch, s, heads = 3, args.seq_length, 4
    model_parallel_cuda_manual_seed(1)
    spec = get_gpt_layer_local_spec(multi_latent_attention=True, qk_layernorm=True)
    attention = build_module(spec.submodules.self_attention, config=config, layer_number=1)
    with FlopCounterMode(display=False) as counter:
        output, _ = attention(torch.randn(s, batch, 32, requires_grad=True), None)
        output.sum().backward()
    other_half = 3 * batch * heads * s * s * (8 + 4 + 6)
    norms = 6 * batch * s * (20 + (rank_q or 0))
    without_attention = num_floating_point_operations(
        shape(num_layers=0, multi_latent_attention=True, **latent), batch
    )
    mlp = 12 * batch * s * 32 * 128
    counted = num_floating_point_operations(args, batch) - without_attention - mlp
    assert counted - norms == counter.get_total_flops() - other_half
