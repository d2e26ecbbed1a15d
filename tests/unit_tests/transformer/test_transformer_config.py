"""Derived values and rules of the config."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megatron.core.config_logger import log_config_to_disk
from megatron.core.errors import ConfigError
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from tests.unit_tests.test_public_names import problems_in

BASE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
MOE = {"num_moe_experts": 4, "add_bias_linear": False}


def test_derived_values():
    config = TransformerConfig(**BASE)
    assert (config.ffn_hidden_size, config.kv_channels, config.num_query_groups) == (128, 8, 4)
    assert config.recompute_modules == ["core_attn"]
    assert config.expert_tensor_parallel_size == 1
    assert config.microbatch_group_size_per_vp_stage == 1
    assert config.autocast_dtype is torch.float32
    assert repr(config.init_method) == "normal(std=0.02)"
    assert repr(config.output_layer_init_method) == "normal(std=0.01)"
    scaled = TransformerConfig(**BASE, apply_query_key_layer_scaling=True, attention_softmax_in_fp32=False)
    assert scaled.attention_softmax_in_fp32
    moe = TransformerConfig(**BASE, **MOE, moe_layer_recompute=True, moe_expert_capacity_factor=-1.0)
    assert moe.recompute_granularity == "selective"
    assert moe.recompute_modules == ["core_attn", "moe"]
    assert moe.moe_expert_capacity_factor is None
    assert moe.moe_ffn_hidden_size == 128


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"fp16": True, "bf16": True}, "fp16 and bf16"),
        ({"normalization": "BatchNorm"}, "LayerNorm, RMSNorm"),
        ({"num_attention_heads": 5}, "hidden_size 32"),
        ({"num_query_groups": 3}, "one of 1, 2, 4"),
        ({"tensor_model_parallel_size": 3}, "num_attention_heads 4"),
        ({"sequence_parallel": True}, "sequence_parallel"),
        ({"pipeline_model_parallel_size": 2}, "pipeline_dtype"),
        ({"expert_model_parallel_size": 2}, "num_moe_experts"),
        ({"attention_layout": "BNSD"}, "SBH, BSH"),
        ({"window_size": (1, 2, 3)}, "window_size"),
        ({"window_size": (-2, 0)}, "window_size"),
        ({"glu_gate_last": True}, "gated_linear_unit=True"),
        ({"bias_activation_fusion": True, "activation_func": F.relu}, "relu"),
        ({"bias_activation_fusion": True, "add_bias_linear": False}, "no bias to fuse; leave it off"),
        ({"recompute_granularity": "some"}, "full or selective"),
        ({"recompute_granularity": "full", "recompute_num_layers": 1}, "uniform or block"),
        ({"recompute_granularity": "full", "recompute_method": "block"}, "recompute_num_layers"),
        ({"recompute_granularity": "selective", "recompute_num_layers": 1}, "leave it unset"),
        ({"recompute_modules": ["mpl"]}, "mpl not among"),
        ({"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}, "moe_grouped_gemm"),
        ({"defer_embedding_wgrad_compute": True}, "gradient_accumulation_fusion=True"),
        ({"overlap_p2p_comm_warmup_flush": True}, "batch_p2p_comm=False"),
        ({"num_moe_experts": 4}, "add_bias_linear=False"),
        ({**MOE, "moe_router_topk": 1}, "moe_router_pre_softmax"),
        ({**MOE, "moe_router_enable_expert_bias": True}, "sigmoid"),
        ({**MOE, "moe_pad_expert_input_to_capacity": True}, "moe_expert_capacity_factor"),
        ({**MOE, "moe_router_num_groups": 3}, "moe_router_num_groups 3"),
        ({**MOE, "moe_shared_expert_overlap": True}, "alltoall"),
    ],
)
def test_contradictory_fields_are_named(fields, names):
    with pytest.raises(ConfigError) as caught:
        TransformerConfig(**BASE | fields)
    assert names in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as caught:
        TransformerConfig(**BASE, fp16=True, bf16=True, num_query_groups=3, attention_layout="X")
    assert len(str(caught.value).splitlines()) == 3


def test_latent_attention_defaults():
    config = MLATransformerConfig(**BASE)
    assert (config.q_lora_rank, config.normalization, config.rope_type) == (512, "RMSNorm", "yarn")
    with pytest.raises(ConfigError, match="rotary_interleaved"):
        MLATransformerConfig(**BASE, rotary_interleaved=True)


def test_fields_can_be_copied_by_name():
    """The command line fills a config from its own namespace by field names."""
    config = TransformerConfig(**BASE)
    names = {field.name for field in dataclasses.fields(config)}
    assert {"window_size", "attention_layout", "glu_gate_last", "params_dtype", "moe_router_dtype"} <= names
    again = TransformerConfig(**{name: getattr(config, name) for name in names})
    assert again == config


def test_config_log(tmp_path):
    config = TransformerConfig(**BASE, config_logger_dir=str(tmp_path))
    for _ in range(2):
        log_config_to_disk(config, {"self": config, "config": config, "size": 3})
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"TransformerConfig.rank_0.iter{i}.json" for i in range(2)]
    assert '"hidden_size": 32' in (tmp_path / files[0]).read_text()


def test_defaults_are_the_original_ones() -> None:
    assert problems_in("megatron.core.transformer") == []


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
UNEVEN = {
    "pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32, "num_layers_in_last_pipeline_stage": 1
}  # fmt: skip
PADDED = {**MOE, "moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
SEQUENCE = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("fits", "breaks", "names"),
    [
        (SEQUENCE, {"distribute_saved_activations": True}, "distribute_saved_activations"),
        ({"recompute_granularity": "selective"}, {"recompute_modules": ["mla_up_proj"]}, "mla_up_proj"),
        ({**MOE, "moe_layer_recompute": True}, FULL, "moe_layer_recompute"),
        (UNEVEN, {"account_for_loss_in_pipeline_split": True}, "not together with"),
        (UNEVEN, {"account_for_embedding_in_pipeline_split": True}, "not together with"),
        (UNEVEN, {"num_layers_in_last_pipeline_stage": 0}, "must be at least 1"),
        ({"cp_comm_type": ["p2p"]}, {"context_parallel_size": 2}, "1 words for 2 layers"),
        ({**MOE, "num_moe_experts": 2}, {"num_moe_experts": 0}, "must be positive"),
        (PADDED, {"moe_expert_capacity_factor": None}, "set moe_expert_capacity_factor"),
        (PADDED, {"moe_router_load_balancing_type": "sinkhorn"}, "aux_loss"),
        (
            {**MOE, "moe_shared_expert_intermediate_size": 8, "moe_shared_expert_overlap": True}
            | {"moe_token_dispatcher_type": "alltoall_seq"},
            {"moe_token_dispatcher_type": "allgather"},
            "moe_shared_expert_overlap",
        ),
        (
            {**MOE, "moe_token_dispatcher_type": "allgather"},
            {"variable_seq_lengths": True},
            "variable_seq_lengths",
        ),
        ({**MOE, "moe_router_topk": 2}, {"moe_router_topk": 1}, "a softmax over one score"),
        (
            {**MOE, "moe_router_num_groups": 2, "moe_router_group_topk": 2},
            {"moe_router_group_topk": 3},
            "exceeds moe_router_num_groups 2",
        ),
        (
            {**MOE, "moe_router_num_groups": 2, "moe_router_group_topk": 1},
            {"moe_router_num_groups": None},
            "set moe_router_num_groups",
        ),
    ],
)
def test_rules_of_settings_that_need_each_other(fits, breaks, names):
    TransformerConfig(**BASE | fits)
    with pytest.raises(ConfigError) as caught:
        TransformerConfig(**BASE | fits | breaks)
    assert names in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_single_expert_needs_no_softmax_over_all_in_other_ways():
    for fields in (
        {"moe_router_pre_softmax": True},
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_load_balancing_type": "sinkhorn"},
    ):
        TransformerConfig(**BASE, **MOE, moe_router_topk=1, **fields)


def test_wrong_sizes_of_latent_attention_are_refused_together():
    with pytest.raises(ConfigError) as error:
        MLATransformerConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            rope_type="llama3",
            kv_lora_rank=0,
            qk_pos_emb_head_dim=5,
            rotary_scaling_factor=0.0,
        )
    for words in (
        "rope_type: 'llama3'",
        "kv_lora_rank 0",
        "qk_pos_emb_head_dim 5",
        "rotary_scaling_factor 0.0",
    ):
        assert words in str(error.value)


def test_latent_attention_needs_its_config():
    with pytest.raises(ConfigError, match="use that class"):
        TransformerConfig(num_layers=2, hidden_size=16, num_attention_heads=4, multi_latent_attention=True)
