"""Parameter names, row orders and optimizer numbering that differ between checkpoints of equal weights."""

from argparse import Namespace
from collections import OrderedDict

import pytest
import torch

from megatron.core.errors import CheckpointError
from megatron.training import checkpointing
from megatron.training.checkpointing import optimizer_state, parameter_names

LAYER = "decoder.layers.1."
PLAIN = [LAYER + "input_layernorm.weight", LAYER + "pre_mlp_layernorm.bias", "decoder.final_layernorm.weight"]
FUSED = [
    LAYER + "self_attention.linear_qkv.layer_norm_weight",
    LAYER + "mlp.linear_fc1.layer_norm_bias",
    "decoder.final_layernorm.weight",
]


@pytest.mark.parametrize(
    ("stored", "wanted"), [(PLAIN, FUSED), (FUSED, PLAIN), (PLAIN, PLAIN), (FUSED, FUSED)]
)
def test_norm_names_are_translated_between_plain_and_fused_layers(stored: list[str], wanted: list[str]):
    assert list(parameter_names.rename_to(stored, wanted).values()) == wanted


def test_unknown_parameter_names_are_not_changed():
    assert parameter_names.rename_to(["decoder.layers.0.input_layernorm.weight"], ["other"]) == {
        "decoder.layers.0.input_layernorm.weight": "decoder.layers.0.input_layernorm.weight"
    }


def test_extra_state_is_fitted_and_rotary_frequencies_are_dropped():
    """8-bit scaling bytes go only to a model that has them; computed tables are dropped."""
    stored = {
        "w": torch.ones(1),
        "fc._extra_state": torch.ones(9),
        "core_attention._extra_state": torch.ones(9),
        "fp8._extra_state": b"scales",
        "rotary_pos_emb.inv_freq": torch.ones(4),
    }
    wanted = {"w": torch.zeros(1), "fc._extra_state": None, "fp8._extra_state": b"", "new._extra_state": None}
    fitted, renamed = parameter_names.fit_model_state(stored, wanted)
    assert renamed == {}
    assert fitted == OrderedDict(
        [
            ("w", stored["w"]),
            ("fc._extra_state", None),
            ("fp8._extra_state", b"scales"),
            ("new._extra_state", None),
        ]
    )
    assert parameter_names.differences(fitted, wanted) == []


def test_long_lists_of_differences_are_shortened():
    problems = parameter_names.differences({f"w{i}": None for i in range(20)}, {})
    assert len(problems) == 1 and "(20)" in problems[0] and "... and 14 more" in problems[0]
    assert parameter_names.differences({"w": None}, {}, strict=False) == []


@pytest.mark.parametrize("version", [0, 1.0])
@pytest.mark.parametrize(("module", "parts"), [("linear_qkv", 3), ("linear_kv", 2)])
def test_attention_rows_of_old_versions_are_reordered(version: float, module: str, parts: int):
    """Each row is labelled (part, head, element); today's order is head, part, element."""
    heads, dim = 3, 4
    order = {
        0: [(p, n, d) for p in range(parts) for n in range(heads) for d in range(dim)],
        1.0: [(p, n, d) for n in range(heads) for d in range(dim) for p in range(parts)],
    }[version]
    today = [(p, n, d) for n in range(heads) for p in range(parts) for d in range(dim)]
    model = torch.nn.Module()
    model.config = Namespace(kv_channels=dim)
    model.attention = torch.nn.Module()
    setattr(model.attention, module, torch.nn.Linear(3, heads * parts * dim))
    model.attention.other = torch.nn.Linear(3, heads * parts * dim)
    labels = torch.tensor(order, dtype=torch.float)
    layer = getattr(model.attention, module)
    layer.weight.data, layer.bias.data = labels.clone(), labels[:, 1] * 100 + labels[:, 0] * 10 + labels[:, 2]
    untouched = model.attention.other.weight.clone()
    checkpointing.fix_query_key_value_ordering([model], version)
    expected = torch.tensor(today, dtype=torch.float)
    assert torch.equal(layer.weight, expected)
    assert torch.equal(layer.bias, expected[:, 1] * 100 + expected[:, 0] * 10 + expected[:, 2])
    assert torch.equal(model.attention.other.weight, untouched)


def test_current_versions_are_unchanged_and_unknown_ones_refused():
    checkpointing.fix_query_key_value_ordering(torch.nn.Module(), 2.0)
    with pytest.raises(CheckpointError, match=r"version 1\.5"):
        checkpointing.fix_query_key_value_ordering(torch.nn.Module(), 1.5)


def test_checkpoint_version_is_kept_and_must_not_change():
    checkpointing.set_checkpoint_version(None)
    assert checkpointing.get_checkpoint_version() is None
    checkpointing.set_checkpoint_version(2.0)
    checkpointing.set_checkpoint_version(2.0)
    with pytest.raises(CheckpointError, match=r"2\.0 and 3\.0"):
        checkpointing.set_checkpoint_version(3.0)
    assert checkpointing.get_checkpoint_version() == 2.0
    checkpointing.set_checkpoint_version(None)


# A layer in the order of registration: plain, and the order of a fused one under the plain names.
PLAIN_ORDER = [("ln.weight", 1), ("proj.weight", 2), ("proj.bias", 1), ("qkv.weight", 2), ("qkv.bias", 1)]
FUSED_ORDER = [("proj.weight", 2), ("proj.bias", 1), ("ln.weight", 1), ("qkv.weight", 2), ("qkv.bias", 1)]


@pytest.mark.parametrize(
    ("stored_order", "wanted_order"), [(PLAIN_ORDER, FUSED_ORDER), (FUSED_ORDER, PLAIN_ORDER)]
)
@pytest.mark.parametrize("half", [False, True])
def test_optimizer_state_is_renumbered_by_parameter_name(stored_order: list, wanted_order: list, half: bool):
    """A later stage: the plain layer starts with a group of vectors, the fused one with matrices."""
    stored = optimizer_state.group_names(stored_order, decoupled_lr=False)
    wanted = optimizer_state.group_names(wanted_order, decoupled_lr=False)
    flat = [name for group in stored.values() for name in group]
    groups, start = [], 0
    for (decay, _), members in stored.items():
        groups.append({"wd_mult": decay, "params": list(range(start, start + len(members)))})
        start += len(members)
    inner = {"state": {i: {"exp_avg": name} for i, name in enumerate(flat)}, "param_groups": groups}
    state = {"optimizer": inner, "grad_scaler": "kept", "fp32_from_fp16_params": list(stored.values())}
    result = optimizer_state.renumber(state if half else inner, stored, wanted)
    new_inner = result["optimizer"] if half else result
    new_flat = [name for group in wanted.values() for name in group]
    assert [new_inner["state"][i]["exp_avg"] for i in range(5)] == new_flat
    assert [group["wd_mult"] for group in new_inner["param_groups"]] == [decay for decay, _ in wanted]
    assert [i for group in new_inner["param_groups"] for i in group["params"]] == list(range(5))
    if half:
        assert result["fp32_from_fp16_params"] == list(wanted.values()) and result["grad_scaler"] == "kept"


def test_decoupled_parameters_have_a_group_of_their_own():
    parameters = [("embedding.word_embeddings.weight", 2), ("fc.weight", 2), ("output_layer.weight", 2)]
    assert list(optimizer_state.group_names(parameters, decoupled_lr=True).values()) == [
        ["embedding.word_embeddings.weight", "output_layer.weight"],
        ["fc.weight"],
    ]
    assert len(optimizer_state.group_names(parameters, decoupled_lr=False)) == 1


def test_optimizer_state_with_other_groups_is_refused():
    stored = optimizer_state.group_names(PLAIN_ORDER, decoupled_lr=False)
    wanted = optimizer_state.group_names(FUSED_ORDER, decoupled_lr=False)
    state = {"state": {}, "param_groups": [{"params": [0]}]}
    with pytest.raises(CheckpointError, match="--no-load-optim"):
        optimizer_state.renumber(state, stored, wanted)
