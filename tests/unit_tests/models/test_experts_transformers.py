"""Models with experts against the transformers library: tiny random weights, equal logits."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.models.gpt.family import layer_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.reference_models import load_transformers

transformers = load_transformers()

LAYERS, HIDDEN, HEADS, GROUPS, VOCABULARY, LENGTH = 2, 32, 4, 2, 96, 24
EXPERTS, TOPK, WIDTH, SHARED, DENSE = 8, 3, 20, 28, 44
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": LENGTH,
    "num_experts_per_tok": TOPK,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}
QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": WIDTH}


def mixtral():
    """Softmax over the chosen experts."""
    config = transformers.MixtralConfig(**COMMON, num_local_experts=EXPERTS, intermediate_size=WIDTH)
    return transformers.MixtralForCausalLM(config), {}


def qwen2_moe():
    """Softmax over all experts, not normalised again; gated shared experts; a dense layer; biases on QKV."""
    config = transformers.Qwen2MoeConfig(
        **COMMON,
        **QWEN,
        shared_expert_intermediate_size=SHARED,
        intermediate_size=DENSE,
        mlp_only_layers=[0],
        norm_topk_prob=False,
    )
    return transformers.Qwen2MoeForCausalLM(config), {
        "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": SHARED,
        "moe_shared_expert_gate": True,
        "moe_layer_freq": [0, 1],
        "ffn_hidden_size": DENSE,
        "add_qkv_bias": True,
    }


def qwen3_moe():
    """Normalised weights, norms of heads, heads wider than their share."""
    config = transformers.Qwen3MoeConfig(**COMMON, **QWEN, head_dim=12, norm_topk_prob=True)
    return transformers.Qwen3MoeForCausalLM(config), {"qk_layernorm": True, "kv_channels": 12}


def grouped_rows(parts, groups):
    """Rows of separate projections -> per group, its queries, its key, its value."""
    by_group = zip(*(part.chunk(groups) for part in parts), strict=True)
    return torch.cat([rows for group in by_group for rows in group])


def mlp_weights(theirs, source, target):
    gate, up = theirs[f"{source}gate_proj.weight"], theirs[f"{source}up_proj.weight"]
    return {
        f"{target}linear_fc1.weight": torch.cat([gate, up]),
        f"{target}linear_fc2.weight": theirs[f"{source}down_proj.weight"],
    }


def expert_weights(theirs, source, target):
    """[E, 2f, h] and [E, h, f] -> the same of each expert."""
    ours = {}
    first, second = theirs[f"{source}experts.gate_up_proj"], theirs[f"{source}experts.down_proj"]
    for number in range(EXPERTS):
        ours[f"{target}experts.local_experts.{number}.linear_fc1.weight"] = first[number]
        ours[f"{target}experts.local_experts.{number}.linear_fc2.weight"] = second[number]
    ours[f"{target}router.weight"] = theirs[f"{source}gate.weight"]
    if f"{source}shared_expert_gate.weight" in theirs:
        ours |= mlp_weights(theirs, f"{source}shared_expert.", f"{target}shared_experts.")
        ours[f"{target}shared_experts.gate_weight"] = theirs[f"{source}shared_expert_gate.weight"]
    return ours


def our_weights(theirs):
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }
    norms = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "pre_mlp_layernorm"}
    norms |= {
        "self_attn.q_norm": "self_attention.q_layernorm",
        "self_attn.k_norm": "self_attention.k_layernorm",
    }
    for layer in range(LAYERS):
        source, target = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            names = [f"{source}self_attn.{part}_proj.{kind}" for part in "qkv"]
            if names[0] in theirs:
                rows = grouped_rows([theirs[name] for name in names], GROUPS)
                ours[f"{target}self_attention.linear_qkv.{kind}"] = rows
        ours[f"{target}self_attention.linear_proj.weight"] = theirs[f"{source}self_attn.o_proj.weight"]
        for name, ours_name in norms.items():
            if f"{source}{name}.weight" in theirs:
                ours[f"{target}{ours_name}.weight"] = theirs[f"{source}{name}.weight"]
        is_dense = f"{source}mlp.gate_proj.weight" in theirs
        ours |= (mlp_weights if is_dense else expert_weights)(theirs, f"{source}mlp.", f"{target}mlp.")
    return ours


def as_grouped(weights):
    """Weights of one expert after the other as the two weights of grouped experts."""
    grouped = dict(weights)
    for layer in range(LAYERS):
        prefix = f"decoder.layers.{layer}.mlp.experts."
        for number in (1, 2):
            names = [f"{prefix}local_experts.{e}.linear_fc{number}.weight" for e in range(EXPERTS)]
            if names[0] in weights:
                blocks = torch.stack([grouped.pop(name).t() for name in names])
                shape = (HIDDEN, -1) if number == 1 else (-1, HIDDEN)
                grouped[f"{prefix}weight{number}"] = blocks.reshape(shape)
    return grouped


@pytest.mark.parametrize("grouped", [False, True], ids=["sequential", "grouped"])
@pytest.mark.parametrize("make", [mixtral, qwen2_moe, qwen3_moe])
def test_logits_equal(make, grouped):
    torch.manual_seed(5)
    reference, fields = make()
    reference.eval()
    for parameter in reference.parameters():
        if parameter.dim() == 1:  # norm weights of 1 and biases of 0 would hide a mistake in them
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    weights = our_weights(reference.state_dict())
    config = TransformerConfig(
        **{
            "num_layers": LAYERS,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_query_groups": GROUPS,
            "ffn_hidden_size": WIDTH,
            "moe_ffn_hidden_size": WIDTH,
            "num_moe_experts": EXPERTS,
            "moe_router_topk": TOPK,
            "moe_grouped_gemm": grouped,
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            **fields,
        }
    )
    model_parallel_cuda_manual_seed(3)
    spec = layer_spec(config, False)
    model = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope").eval()
    model.load_state_dict(as_grouped(weights) if grouped else weights, strict=True)
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    positions = torch.arange(LENGTH).expand_as(tokens)
    with torch.no_grad():
        expected = reference(tokens).logits
        found = model(tokens, positions, None)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
