"""Latent attention, and experts behind it, against the transformers library: tiny random DeepSeek models."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig
from tests.reference_models import load_transformers

transformers = load_transformers()

LAYERS, HIDDEN, FFN, HEADS, VOCABULARY, LENGTH = 2, 32, 48, 4, 96, 64
CONTEXT, FACTOR = 16, 4.0  # trained on 16 positions, run on 64
YARN = {"beta_fast": 8.0, "beta_slow": 1.0, "mscale": 0.8, "mscale_all_dim": 0.8}
RANK_Q, RANK_KV, PLAIN, TURNED, VALUE = 16, 12, 8, 4, 6
EPSILON = 1e-6
MODELS = {
    "V2": ("DeepseekV2Config", "DeepseekV2ForCausalLM"),
    "V3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
}


def reference_model(version, rank_q, yarn, **experts):
    config_class, model_class = MODELS[version]
    scaling = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn:
        scaling = {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": FACTOR,
            "original_max_position_embeddings": CONTEXT,
            **YARN,
        }
    config = getattr(transformers, config_class)(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=rank_q,
        kv_lora_rank=RANK_KV,
        qk_nope_head_dim=PLAIN,
        qk_rope_head_dim=TURNED,
        v_head_dim=VALUE,
        **(experts or {"first_k_dense_replace": LAYERS}),
        max_position_embeddings=LENGTH,
        rope_parameters=scaling,
        rms_norm_eps=EPSILON,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    torch.manual_seed(5)
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():
        # Norm weights of 1 would hide a mistake in them.
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


ATTENTION = {
    "o_proj": "linear_proj",
    "q_proj": "linear_q_proj",
    "q_a_proj": "linear_q_down_proj",
    "q_b_proj": "linear_q_up_proj",
    "kv_a_proj_with_mqa": "linear_kv_down_proj",
    "kv_b_proj": "linear_kv_up_proj",
}


def mlp_weights(theirs, old, new):
    if f"{old}gate.weight" not in theirs:
        gate, up = (theirs[f"{old}{name}_proj.weight"] for name in ("gate", "up"))
        return {
            f"{new}linear_fc1.weight": torch.cat((gate, up)),
            f"{new}linear_fc2.weight": theirs[f"{old}down_proj.weight"],
        }
    ours = mlp_weights(theirs, f"{old}shared_experts.", f"{new}shared_experts.")
    ours[f"{new}router.weight"] = theirs[f"{old}gate.weight"]
    if f"{old}gate.e_score_correction_bias" in theirs:
        ours[f"{new}router.expert_bias"] = theirs[f"{old}gate.e_score_correction_bias"]
    for number in range(EXPERTS):
        expert = f"{new}experts.local_experts.{number}."
        ours[f"{expert}linear_fc1.weight"] = theirs[f"{old}experts.gate_up_proj"][number]
        ours[f"{expert}linear_fc2.weight"] = theirs[f"{old}experts.down_proj"][number]
    return ours


def our_weights(theirs, te_names):
    ours = {
        "embedding.word_embeddings.weight": theirs["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": theirs["model.norm.weight"],
        "output_layer.weight": theirs["lm_head.weight"],
    }
    before_mlp = "mlp.linear_fc1.layer_norm_weight" if te_names else "pre_mlp_layernorm.weight"
    norm = "linear_{}_up_proj.layer_norm_weight" if te_names else "{}_layernorm.weight"
    for number in range(LAYERS):
        old, new = f"model.layers.{number}.", f"decoder.layers.{number}."
        ours[f"{new}input_layernorm.weight"] = theirs[f"{old}input_layernorm.weight"]
        ours[f"{new}{before_mlp}"] = theirs[f"{old}post_attention_layernorm.weight"]
        for their_name, our_name in ATTENTION.items():
            weight = theirs.get(f"{old}self_attn.{their_name}.weight")
            if weight is not None:
                ours[f"{new}self_attention.{our_name}.weight"] = weight
        for their_name, what in (("q_a_layernorm", "q"), ("kv_a_layernorm", "kv")):
            weight = theirs.get(f"{old}self_attn.{their_name}.weight")
            if weight is not None:
                ours[f"{new}self_attention.{norm.format(what)}"] = weight
        ours |= mlp_weights(theirs, f"{old}mlp.", f"{new}mlp.")
    return ours


def our_config(rank_q, yarn, **more):
    return MLATransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        ffn_hidden_size=FFN,
        num_attention_heads=HEADS,
        q_lora_rank=rank_q,
        kv_lora_rank=RANK_KV,
        qk_head_dim=PLAIN,
        qk_pos_emb_head_dim=TURNED,
        v_head_dim=VALUE,
        qk_layernorm=True,
        rope_type="yarn" if yarn else "rope",
        rotary_scaling_factor=FACTOR if yarn else 1.0,
        max_position_embeddings=CONTEXT,
        **(YARN if yarn else {}),
        layernorm_epsilon=EPSILON,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **more,
    )


def check_logits(reference, config, spec, te_names=False):
    model_parallel_cuda_manual_seed(3)
    model = GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type="rope").eval()
    model.load_state_dict(our_weights(reference.state_dict(), te_names), strict=True)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = reference(tokens).logits
        found = model(tokens, None, None)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("backend", [AttnBackend.auto, AttnBackend.unfused], ids=lambda b: b.name)
@pytest.mark.parametrize("te_names", [False, True])
@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("rank_q", [RANK_Q, None])
@pytest.mark.parametrize("version", MODELS)
def test_deepseek_logits(version, rank_q, yarn, te_names, backend):
    make = get_gpt_layer_with_transformer_engine_spec if te_names else get_gpt_layer_local_spec
    spec = make(qk_layernorm=True, multi_latent_attention=True)
    config = our_config(rank_q, yarn, attention_backend=backend)
    check_logits(reference_model(version, rank_q, yarn), config, spec, te_names)


EXPERTS, TOPK, WIDTH, GROUPS, KEPT = 8, 4, 20, 4, 2
THEIR_EXPERTS = {
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": TOPK,
    "moe_intermediate_size": WIDTH,
    "n_shared_experts": 2,
    "n_group": GROUPS,
    "topk_group": KEPT,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
OUR_EXPERTS = {
    "num_moe_experts": EXPERTS,
    "moe_router_topk": TOPK,
    "moe_ffn_hidden_size": WIDTH,
    "moe_shared_expert_intermediate_size": 2 * WIDTH,
    "moe_router_num_groups": GROUPS,
    "moe_router_group_topk": KEPT,
    "moe_layer_freq": [0, 1],
    "moe_router_topk_scaling_factor": 1.7,
}
ROUTINGS = {
    "V2": (
        {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
        {"moe_router_load_balancing_type": "group_limited_greedy"},
    ),
    "V3": (
        {"norm_topk_prob": True},
        {
            "moe_router_load_balancing_type": "none",
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_dtype": "fp32",
        },
    ),
}


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("version", ROUTINGS)
def test_deepseek_logits_with_experts(version, dispatcher):
    theirs, ours = ROUTINGS[version]
    reference = reference_model(version, RANK_Q, True, **THEIR_EXPERTS, **theirs)
    for name, buffer in reference.named_buffers():
        if name.endswith("e_score_correction_bias"):  # zeros would hide that it is not used
            buffer.copy_(torch.randn_like(buffer) * 0.1)
    config = our_config(RANK_Q, True, **OUR_EXPERTS, **ours, moe_token_dispatcher_type=dispatcher)
    check_logits(reference, config, get_gpt_decoder_block_spec(config, False))
