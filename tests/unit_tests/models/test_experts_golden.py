"""GPT with experts against figures of the original, in the ways of running it that only experts have."""

import pytest
from golden_gpt import check

CASES = ["moe_seq_top2", "moe_grouped", "moe_deepseek"]
SELECTIVE = {"recompute_granularity": "selective"}


@pytest.mark.parametrize("name", CASES)
def test_transformer_engine_names(golden, name):
    check(golden, name, te_names=True, moe_use_legacy_grouped_gemm=name == "moe_grouped")


@pytest.mark.parametrize("name", CASES)
def test_an_mlp_is_recomputed_in_dense_layers_only(golden, name):
    check(golden, name, recompute_modules=["core_attn", "layernorm", "mlp"], **SELECTIVE)


@pytest.mark.parametrize("modules", [["moe_act"], ["moe_act", "moe"]], ids=str)
def test_recompute_of_activations(golden, modules):
    check(golden, "moe_grouped", recompute_modules=modules, **SELECTIVE)


@pytest.mark.parametrize("name", CASES)
def test_full_recompute(golden, name):
    check(golden, name, recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2)


@pytest.mark.parametrize("recomputed", [{}, {"moe_layer_recompute": True}], ids=str)
def test_shared_experts_while_tokens_travel(golden, recomputed):
    check(golden, "moe_deepseek", moe_shared_expert_overlap=True, **recomputed)
