"""GPT against figures of the original: logits, losses and the gradient of every parameter."""

import pytest
import torch
from golden_gpt import GoldenCase, check

from megatron.core.parallel_state import get_moe_layer_wise_logging_tracker
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.moe.moe_utils import clear_aux_losses_tracker

CASES = [
    "gpt2_tied",
    "gpt2_fusedgelu",
    "gqa_partial_rope",
    "llama_untied",
    "rope_interleaved_scaled",
    "sqrelu_qkln",
    "mla_qlora",
    "mtp1",
]
EXPERTS = ["moe_seq_top2", "moe_grouped", "moe_deepseek"]
BACKENDS = [AttnBackend.auto, AttnBackend.unfused]
RECOMPUTE = {
    "core": {"recompute_granularity": "selective"},
    "all parts": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm", "mlp"],
    },
    "uniform": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 2,
    },
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("layout", ["SBH", "BSH"])
@pytest.mark.parametrize("name", CASES)
def test_attention_paths(golden, name, backend, layout):
    check(golden, name, attention_backend=backend, attention_layout=layout)


@pytest.mark.parametrize("modules", [None, ["moe"], ["moe", "layernorm"]], ids=str)
@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall", "alltoall_seq", "flex"])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_give_logits_gradients_and_logged_losses(golden, name, dispatcher, modules):
    recompute = {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
    clear_aux_losses_tracker()
    case = check(golden, name, moe_token_dispatcher_type=dispatcher, **recompute)
    for loss, by_layer in case.info["aux"].items():
        found = get_moe_layer_wise_logging_tracker()[loss]["values"]
        torch.testing.assert_close(found, torch.tensor(by_layer), atol=0, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("how", RECOMPUTE)
@pytest.mark.parametrize("name", ["gpt2_tied", "gqa_partial_rope", "mla_qlora", "mtp1"])
def test_recompute(golden, name, how, backend):
    check(golden, name, attention_backend=backend, **RECOMPUTE[how])


@pytest.mark.parametrize("name", CASES)
def test_transformer_engine_names(golden, name):
    check(golden, name, te_names=True, **RECOMPUTE["all parts"])


@pytest.mark.parametrize("te_names", [False, True])
@pytest.mark.parametrize("modules", [["mla_up_proj"], ["mla_up_proj", "core_attn"]])
@pytest.mark.parametrize("layout", ["SBH", "BSH"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_recomputed_heads_of_latent_attention_give_equal_gradients(
    golden, backend, layout, modules, te_names
):
    check(
        golden,
        "mla_qlora",
        te_names=te_names,
        attention_backend=backend,
        attention_layout=layout,
        recompute_granularity="selective",
        recompute_modules=modules,
    )


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_explicit_causal_mask_changes_nothing(golden, backend):
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    check(golden, "gqa_partial_rope", mask=mask, attention_backend=backend)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("window", [(15, 0), (-1, -1), (65536, 65536)])
def test_window_over_whole_sequence_changes_nothing(golden, window, backend):
    check(golden, "gpt2_tied", window_size=window, attention_backend=backend)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_layer_scaling_changes_nothing(golden, backend):
    check(golden, "gpt2_tied", apply_query_key_layer_scaling=True, attention_backend=backend)


def test_extra_state_is_written_and_optional(golden):
    case = GoldenCase(golden / "model" / "gpt2_tied")
    model = case.model()
    state = model.state_dict()
    assert [name for name, value in state.items() if value is None] == case.info["none_keys"]
    assert [name for name, value in state.items() if value is not None] == list(case.info["params"])
    model.load_state_dict(state, strict=True)
    model.load_state_dict({name: value for name, value in state.items() if value is not None}, strict=True)


def test_two_stages_equal_one(golden):
    case = GoldenCase(golden / "model" / "llama_untied")
    whole = case.model()
    from megatron.core.models.gpt.gpt_model import GPTModel

    config = case.config(num_layers=1)
    first, last = (
        GPTModel(config, whole.transformer_layer_spec, 128, 32, pre, not pre, **case.info["model"])
        for pre in (True, False)
    )
    first.load_state_dict(whole.state_dict(), strict=False)
    moved = {name.replace("layers.1.", "layers.0."): value for name, value in whole.state_dict().items()}
    last.load_state_dict(moved, strict=False)
    tokens, labels = case.io["tokens"], case.io["labels"]
    last.set_input_tensor([first(tokens, None, None)])
    per_token = last(None, None, None, labels=labels)
    torch.testing.assert_close(per_token, case.io["loss_per_token"], atol=1e-5, rtol=0)
