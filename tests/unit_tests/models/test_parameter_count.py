"""The closed form of the parameter count against the modules, over the combinations of features."""

import itertools

import pytest
import torch.nn.functional as F

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.parameter_count import gpt_parameter_count
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from tests.unit_tests.test_public_names import problems_in

VOCABULARY, MAX_SEQUENCE = 40, 12

SWITCHES = {
    "normalization": ["LayerNorm", "RMSNorm"],
    "gated_linear_unit": [False, True],
    "add_bias_linear": [False, True],
    "add_qkv_bias": [False, True],
    "qk_layernorm": [False, True],
    "num_query_groups": [None, 1, 2],
    "kv_channels": [None, 6],
}
MODELS = list(itertools.product(["learned_absolute", "rope", "none"], [False, True], [False, True]))


@pytest.mark.parametrize(("positions", "tied", "te_names"), MODELS)
def test_formula_equals_modules(positions, tied, te_names):
    for values in itertools.product(*SWITCHES.values()):
        fields = dict(zip(SWITCHES, values, strict=True))
        config = TransformerConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            ffn_hidden_size=20,
            activation_func=F.silu,
            perform_initialization=False,
            init_model_with_meta_device=True,
            **fields,
        )
        spec = get_gpt_decoder_block_spec(config, te_names)
        model = GPTModel(
            config,
            spec,
            VOCABULARY,
            MAX_SEQUENCE,
            position_embedding_type=positions,
            share_embeddings_and_output_weights=tied,
        )
        built = sum(parameter.numel() for parameter in model.parameters())
        assert gpt_parameter_count(config, VOCABULARY, MAX_SEQUENCE, positions, tied) == built, fields


STAGES = [(True, True), (True, False), (False, False), (False, True)]


@pytest.fixture
def second_of_two_ranks():
    parallel_state.set_tensor_model_parallel_world_size(2)
    parallel_state.set_tensor_model_parallel_rank(1)
    yield
    parallel_state.set_tensor_model_parallel_world_size(None)
    parallel_state.set_tensor_model_parallel_rank(None)


@pytest.mark.parametrize(("positions", "tied", "te_names"), MODELS)
def test_formula_of_one_rank(positions, tied, te_names, second_of_two_ranks):
    """Of two tensor-parallel ranks, on a stage with or without embedding and output layer."""
    switches = SWITCHES | {"num_query_groups": [None, 2], "normalization": ["LayerNorm"]}
    for values, (first, last) in itertools.product(itertools.product(*switches.values()), STAGES):
        fields = dict(zip(switches, values, strict=True))
        config = TransformerConfig(
            num_layers=3,
            hidden_size=16,
            num_attention_heads=4,
            ffn_hidden_size=20,
            activation_func=F.silu,
            perform_initialization=False,
            init_model_with_meta_device=True,
            tensor_model_parallel_size=2,
            **fields,
        )
        model = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, te_names),
            VOCABULARY,
            MAX_SEQUENCE,
            pre_process=first,
            post_process=last,
            position_embedding_type=positions,
            share_embeddings_and_output_weights=tied,
        )
        built = sum(parameter.numel() for parameter in model.parameters())
        expected = gpt_parameter_count(
            config,
            VOCABULARY,
            MAX_SEQUENCE,
            positions,
            tied,
            tensor_parallel_size=2,
            num_layers=3,
            has_embedding=first,
            has_output=last,
        )
        assert built == expected, (fields, first, last)


LATENT_SWITCHES = {
    "normalization": ["LayerNorm", "RMSNorm"],
    "add_bias_linear": [False, True],
    "qk_layernorm": [False, True],
    "q_lora_rank": [None, 8],
}


@pytest.mark.parametrize("te_names", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_formula_of_latent_attention(te_names, ranks, request):
    if ranks == 2:
        request.getfixturevalue("second_of_two_ranks")
    for values in itertools.product(*LATENT_SWITCHES.values()):
        config = MLATransformerConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            ffn_hidden_size=20,
            kv_lora_rank=10,
            qk_head_dim=3,
            qk_pos_emb_head_dim=2,
            v_head_dim=5,
            tensor_model_parallel_size=ranks,
            perform_initialization=False,
            init_model_with_meta_device=True,
            **dict(zip(LATENT_SWITCHES, values, strict=True)),
        )
        model = GPTModel(
            config,
            get_gpt_decoder_block_spec(config, te_names),
            VOCABULARY,
            MAX_SEQUENCE,
            position_embedding_type="rope",
        )
        expected = gpt_parameter_count(
            config,
            VOCABULARY,
            MAX_SEQUENCE,
            "rope",
            tensor_parallel_size=ranks,
            splits_latents=not te_names,
        )
        assert expected == sum(parameter.numel() for parameter in model.parameters()), values


EXPERT_SWITCHES = {
    "gated_linear_unit": [False, True],
    "moe_grouped_gemm": [False, True],
    "moe_layer_freq": [1, 2, [0, 0, 1]],
    "moe_shared_expert_intermediate_size": [None, 6],
    "moe_shared_expert_gate": [False, True],
}


@pytest.mark.parametrize("te_names", [False, True])
def test_formula_with_experts(te_names):
    for values in itertools.product(*EXPERT_SWITCHES.values()):
        fields = dict(zip(EXPERT_SWITCHES, values, strict=True))
        if fields["moe_shared_expert_gate"] and fields["moe_shared_expert_intermediate_size"] is None:
            continue
        config = TransformerConfig(
            num_layers=3,
            hidden_size=16,
            num_attention_heads=4,
            ffn_hidden_size=20,
            moe_ffn_hidden_size=12,
            num_moe_experts=4,
            add_bias_linear=False,
            activation_func=F.silu,
            perform_initialization=False,
            init_model_with_meta_device=True,
            **fields,
        )
        model = GPTModel(config, get_gpt_decoder_block_spec(config, te_names), VOCABULARY, MAX_SEQUENCE)
        built = sum(parameter.numel() for parameter in model.parameters())
        assert gpt_parameter_count(config, VOCABULARY, MAX_SEQUENCE) == built, fields


def test_a_rank_has_its_part_of_the_experts():
    config = TransformerConfig(
        num_layers=4,
        hidden_size=16,
        num_attention_heads=4,
        num_moe_experts=8,
        moe_layer_freq=[0, 1, 1, 0],
        add_bias_linear=False,
    )
    part = {"first_layer": 2, "num_layers": 2, "has_embedding": False, "has_output": False}
    whole = gpt_parameter_count(config, VOCABULARY, MAX_SEQUENCE, "none", **part)
    experts = 8 * 2 * 16 * 64
    for ep, etp in ((2, 1), (1, 2), (4, 2)):
        sizes = {"expert_parallel_size": ep, "expert_tensor_parallel_size": etp}
        mine = gpt_parameter_count(config, VOCABULARY, MAX_SEQUENCE, "none", **sizes, **part)
        assert whole - mine == experts - experts // (ep * etp)


def test_published_sizes_with_experts():
    common = {
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "num_attention_heads": 32,
    }
    mixtral_8x7b = TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        num_query_groups=8,
        ffn_hidden_size=14336,
        num_moe_experts=8,
        **common,
    )
    assert gpt_parameter_count(mixtral_8x7b, 32000, 32768, "rope", False) == 46_702_792_704
    qwen3_30b_a3b = TransformerConfig(
        num_layers=48,
        hidden_size=2048,
        num_query_groups=4,
        kv_channels=128,
        qk_layernorm=True,
        ffn_hidden_size=6144,
        moe_ffn_hidden_size=768,
        num_moe_experts=128,
        moe_router_topk=8,
        **common,
    )
    assert gpt_parameter_count(qwen3_30b_a3b, 151936, 32768, "rope", False) == 30_532_122_624


def test_published_sizes():
    gpt2 = TransformerConfig(num_layers=12, hidden_size=768, num_attention_heads=12)
    assert gpt_parameter_count(gpt2, 50257, 1024, "learned_absolute", True) == 124_439_808
    llama2_7b = TransformerConfig(
        num_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        ffn_hidden_size=11008,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
    )
    assert gpt_parameter_count(llama2_7b, 32000, 4096, "rope", False) == 6_738_415_616


def test_defaults_are_the_original_ones() -> None:
    assert problems_in("megatron.core.models.gpt", "megatron.core.models.common") == []
