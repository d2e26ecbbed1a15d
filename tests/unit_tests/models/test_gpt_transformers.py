"""GPT against the transformers library: tiny random models, equal logits after a name mapping."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.reference_models import load_transformers

transformers = load_transformers()

LAYERS, HIDDEN, HEADS, VOCABULARY, LENGTH = 2, 32, 4, 96, 24


def interleave_groups(q, k, v, groups):
    """Rows of separate projections -> our rows: per group, its queries, its key, its value."""
    parts = zip(q.chunk(groups), k.chunk(groups), v.chunk(groups), strict=True)
    return torch.cat([row for part in parts for row in part])


def run_ours(config, weights, tokens, **model_arguments):
    model_parallel_cuda_manual_seed(3)
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, **model_arguments).eval()
    model.load_state_dict(weights, strict=True)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)


def random_norms(model):
    """Norm weights of 1 would hide a mistake in them."""
    torch.manual_seed(11)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("backend", [AttnBackend.auto, AttnBackend.unfused], ids=lambda b: b.name)
def test_gpt2(backend):
    torch.manual_seed(5)
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=LENGTH,
            n_embd=HIDDEN,
            n_layer=LAYERS,
            n_head=HEADS,
            initializer_range=0.3,
            attn_implementation="eager",
        )
    ).eval()
    random_norms(reference)
    theirs = reference.state_dict()
    names = {
        "ln_1": "input_layernorm",
        "attn.c_proj": "self_attention.linear_proj",
        "ln_2": "pre_mlp_layernorm",
        "mlp.c_fc": "mlp.linear_fc1",
        "mlp.c_proj": "mlp.linear_fc2",
    }
    ours = {
        "embedding.word_embeddings.weight": theirs["transformer.wte.weight"],
        "embedding.position_embeddings.weight": theirs["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"decoder.final_layernorm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for i in range(LAYERS):
            source, target = f"transformer.h.{i}.", f"decoder.layers.{i}."
            for name, our_name in names.items():
                value = theirs[f"{source}{name}.{kind}"]
                # Their projections are stored [in, out].
                ours[f"{target}{our_name}.{kind}"] = value.t() if value.dim() == 2 else value
            mixed = theirs[f"{source}attn.c_attn.{kind}"]
            q, k, v = (mixed.t() if mixed.dim() == 2 else mixed).chunk(3)
            ours[f"{target}self_attention.linear_qkv.{kind}"] = interleave_groups(q, k, v, HEADS)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        bias_activation_fusion=True,
        attention_backend=backend,
    )
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    with torch.no_grad():
        expected = reference(tokens).logits
    logits = run_ours(config, ours, tokens, share_embeddings_and_output_weights=True)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", [AttnBackend.auto, AttnBackend.unfused], ids=lambda b: b.name)
@pytest.mark.parametrize("groups", [HEADS, 2, 1])
@pytest.mark.parametrize("scaling", [False, True], ids=["plain", "llama3"])
def test_llama(groups, scaling, backend):
    torch.manual_seed(6)
    rope = {"rope_theta": 50000.0, "rope_type": "default"}
    if scaling:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=40,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=groups,
            rms_norm_eps=1e-5,
            initializer_range=0.3,
            tie_word_embeddings=False,
            rope_parameters=rope,
            attn_implementation="eager",
        )
    ).eval()
    random_norms(reference)
    theirs = reference.state_dict()
    names = {
        "input_layernorm": "input_layernorm",
        "self_attn.o_proj": "self_attention.linear_proj",
        "post_attention_layernorm": "pre_mlp_layernorm",
        "mlp.down_proj": "mlp.linear_fc2",
    }
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }
    for i in range(LAYERS):
        source, target = f"model.layers.{i}.", f"decoder.layers.{i}."
        for name, our_name in names.items():
            ours[f"{target}{our_name}.weight"] = theirs[f"{source}{name}.weight"]
        q, k, v = (theirs[f"{source}self_attn.{part}_proj.weight"] for part in "qkv")
        ours[f"{target}self_attention.linear_qkv.weight"] = interleave_groups(q, k, v, groups)
        gate, up = (theirs[f"{source}mlp.{part}_proj.weight"] for part in ("gate", "up"))
        ours[f"{target}mlp.linear_fc1.weight"] = torch.cat((gate, up))
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        ffn_hidden_size=40,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_backend=backend,
    )
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    with torch.no_grad():
        expected = reference(tokens).logits
    logits = run_ours(
        config,
        ours,
        tokens,
        position_embedding_type="rope",
        rotary_base=50000,
        rope_scaling=scaling,
        rope_scaling_factor=8.0,
    )
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
