"""The model's config says what the flags say."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from megatron.core.transformer.enums import AttnBackend
from megatron.training.activations import fast_gelu, quick_gelu, squared_relu
from megatron.training.arguments import ArgumentsError, core_transformer_config_from_args

CASES = [
    (
        "",
        {
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 256,
            "kv_channels": 16,
            "num_query_groups": 4,
        },
    ),
    # defaults of the command line that differ from those of the dataclass
    (
        "",
        {
            "attention_softmax_in_fp32": False,
            "masked_softmax_fusion": True,
            "bias_dropout_fusion": True,
            "gradient_accumulation_fusion": True,
            "apply_rope_fusion": False,
            "persist_layer_norm": True,
            "deallocate_pipeline_outputs": True,
            "batch_p2p_comm": True,
        },
    ),
    ("--group-query-attention --num-query-groups 2", {"num_query_groups": 2}),
    ("--num-query-groups 2", {"num_query_groups": 4}),
    ("--normalization RMSNorm --norm-epsilon 1e-6", {"normalization": "RMSNorm", "layernorm_epsilon": 1e-6}),
    (
        "--apply-layernorm-1p --no-persist-layer-norm",
        {"layernorm_zero_centered_gamma": True, "persist_layer_norm": False},
    ),
    ("", {"activation_func": F.gelu, "gated_linear_unit": False, "bias_activation_fusion": True}),
    ("--swiglu", {"activation_func": F.silu, "gated_linear_unit": True, "bias_activation_fusion": True}),
    ("--swiglu --no-bias-swiglu-fusion", {"bias_activation_fusion": False}),
    ("--no-bias-gelu-fusion", {"bias_activation_fusion": False}),
    (
        "--squared-relu",
        {"activation_func": squared_relu, "gated_linear_unit": False, "bias_activation_fusion": False},
    ),
    (
        "--is-x-model --ffn-hidden-size 96",
        {"activation_func": F.gelu, "gated_linear_unit": True, "glu_gate_last": True, "ffn_hidden_size": 48},
    ),
    (
        "--geglu --disable-bias-linear",
        {"activation_func": F.gelu, "gated_linear_unit": True, "bias_activation_fusion": False},
    ),
    (
        "--gelu-tanh --disable-bias-linear --no-bias-gelu-fusion",
        {"activation_func": F.gelu, "gated_linear_unit": True, "bias_activation_fusion": True},
    ),
    ("--swiglu --geglu", {"activation_func": F.gelu, "gated_linear_unit": True}),
    (
        "--post-norm --embedding-multiplier-scale 78.4 --output-multiplier-scale 0.6 "
        "--attn-logit-softcapping 30 --output-logit-softcapping 20",
        {
            "post_norm": True,
            "embedding_multiplier_scale": 78.4,
            "output_multiplier_scale": 0.6,
            "attn_logit_softcapping": 30.0,
            "output_logit_softcapping": 20.0,
        },
    ),
    (
        "",
        {
            "post_norm": False,
            "embedding_multiplier_scale": 1.0,
            "output_multiplier_scale": None,
            "attn_logit_softcapping": None,
            "output_logit_softcapping": None,
        },
    ),
    ("--coc-parallel-num 8", {"tp_comm_chunks": 1, "tp_comm_fused_matmul": False}),
    ("--use-ascend-coc", {"tp_comm_chunks": 4, "tp_comm_fused_matmul": False}),
    ("--use-ascend-coc --coc-parallel-num 8", {"tp_comm_chunks": 8}),
    ("--use-ascend-mc2", {"tp_comm_chunks": 1, "tp_comm_fused_matmul": True}),
    ("--disable-bias-linear", {"add_bias_linear": False, "add_qkv_bias": False}),
    ("--qk-layernorm", {"qk_layernorm": True}),
    ("--fp16", {"fp16": True, "params_dtype": torch.float16, "pipeline_dtype": torch.float16}),
    ("--bf16 --fp32-residual-connection", {"bf16": True, "fp32_residual_connection": True}),
    ("--attention-backend unfused", {"attention_backend": AttnBackend.unfused}),
    ("--pre-tockens 4 --shape-order BSH", {"window_size": (4, 0), "attention_layout": "BSH"}),
    ("--shape-order BSND", {"attention_layout": "BSH"}),
    ("--attention-dropout 0 --hidden-dropout 0.3", {"attention_dropout": 0.0, "hidden_dropout": 0.3}),
    ("--recompute-activations", {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}),
    (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 2",
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    ),
    ("--init-method-xavier-uniform", {"init_method": torch.nn.init.xavier_uniform_}),
    ("--init-method-xavier-uniform", {"output_layer_init_method": torch.nn.init.xavier_uniform_}),
    ("--use-cpu-initialization", {"use_cpu_initialization": True}),
    ("", {"use_cpu_initialization": False, "fp8": None, "num_moe_experts": None, "cp_comm_type": "p2p"}),
    ("--fp8-format hybrid --fp8-param-gather", {"fp8": None, "fp8_param": False}),
    ("--calculate-per-token-loss", {"calculate_per_token_loss": True}),
    ("--no-initialization --load x", {"perform_initialization": False}),
]


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_arguments_become_fields_of_the_config(words: str, expected: dict, check) -> None:
    config = core_transformer_config_from_args(check(words))
    assert {name: getattr(config, name) for name in expected} == expected


def test_config_of_another_class_gets_its_own_fields(check) -> None:
    @dataclass
    class Small:
        hidden_size: int = 0
        layernorm_epsilon: float = 0.0
        not_an_argument: int = 5

    small = core_transformer_config_from_args(check(), Small)
    assert small == Small(hidden_size=64, layernorm_epsilon=1e-5)


def test_rules_of_the_config_are_told_before_the_model_is_built(check, monkeypatch) -> None:
    from megatron.core.errors import ConfigError
    from megatron.training.arguments import model_config

    def refuse(args):
        raise ConfigError("first fault\nsecond fault")

    monkeypatch.setattr(model_config, "core_transformer_config_from_args", refuse)
    with pytest.raises(ArgumentsError, match="first fault") as error:
        check()
    assert len(error.value.problems) == 2


def test_activations() -> None:
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    torch.testing.assert_close(squared_relu(x), torch.where(x > 0, x * x, torch.zeros_like(x)))
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))
    inner = 0.7978845608 * (x + 0.044715 * x**3)
    torch.testing.assert_close(fast_gelu(x), 0.5 * x * (1 + torch.tanh(inner)), atol=1e-9, rtol=1e-8)


def test_names_of_other_models() -> None:
    from argparse import Namespace

    from megatron.core.errors import ConfigError
    from megatron.training import arguments

    arguments.load_retro_args(Namespace(retro_project_dir=None))
    arguments.validate_model_config_args_from_heterogeneous_config(Namespace())
    with pytest.raises(ConfigError, match="--retro-project-dir here: retrieval"):
        arguments.load_retro_args(Namespace(retro_project_dir="here"))
    with pytest.raises(ConfigError, match="--heterogeneous-layers-config-path"):
        given = Namespace(heterogeneous_layers_config_path="x")
        arguments.validate_model_config_args_from_heterogeneous_config(given)
