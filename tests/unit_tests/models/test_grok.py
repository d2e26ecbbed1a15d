"""Grok-1's layers against float64: each of their parts alone, in both layouts of the parameters."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.errors import ConfigError
from megatron.core.models.gpt.family import GPT
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.parameter_count import gpt_parameter_count
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.unit_tests.models.grok_reference import Shape, logits

LAYERS, HIDDEN, FFN, HEADS, GROUPS, VOCAB, LENGTH = 2, 32, 48, 4, 2, 17, 11
TOKENS = (torch.arange(2 * LENGTH).view(2, LENGTH) * 5) % VOCAB
LABELS = (TOKENS + 3) % VOCAB


def config(**fields):
    defaults = {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": FFN,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "init_method_std": 0.4,
    }
    return TransformerConfig(**defaults | fields)


def build(settings, te_names=False, tied=False):
    """A model whose norms do not all weigh 1."""
    model_parallel_cuda_manual_seed(6)
    model = GPTModel(
        settings,
        GPT.layer_spec(settings, te_names),
        VOCAB,
        LENGTH,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def local_name(name):
    for theirs, ours in LOCAL_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def compare(model, shape, bound=1e-5):
    """Logits, loss, and every gradient."""
    wide = {local_name(name): p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    wanted = logits(wide, TOKENS, shape)
    found = model(TOKENS, None, None)
    close(found, wanted, bound, "logits")
    losses = model(TOKENS, None, None, labels=LABELS)
    wanted_losses = F.cross_entropy(wanted.flatten(0, 1), LABELS.flatten(), reduction="none").view_as(LABELS)
    close(losses, wanted_losses, bound, "loss")
    losses.sum().backward()
    wanted_losses.sum().backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, wide[local_name(name)].grad, 10 * bound, name)


def close(found, wanted, bound, name):
    assert found.shape == wanted.shape
    error = float((found.detach().double() - wanted.detach()).abs().max() / wanted.detach().abs().max())
    assert error < bound, f"{name}: relative error {error:.1e}"


PARTS = {
    "none": ({}, {}),
    "post norms": ({"post_norm": True}, {"post_norm": True}),
    "embedding factor": ({"embedding_multiplier_scale": 3.5}, {"embedding_factor": 3.5}),
    "logit factor": ({"output_multiplier_scale": 0.577}, {"logit_factor": 0.577}),
    "attention cap": ({"attn_logit_softcapping": 0.7}, {"attention_cap": 0.7}),
    "logit cap": (
        {"output_logit_softcapping": 2.0, "output_multiplier_scale": 1.5},
        {"logit_cap": 2.0, "logit_factor": 1.5},
    ),
    "gelu gate": ({"activation_func": F.gelu}, {"gate": "gelu"}),
    "tanh gelu gate": (
        {"activation_func": F.gelu, "bias_activation_fusion": True},
        {"gate": "gelu_tanh"},
    ),
}


@pytest.mark.parametrize("te_names", [False, True], ids=["local names", "TE names"])
@pytest.mark.parametrize("backend", [AttnBackend.fused, AttnBackend.unfused], ids=lambda b: b.name)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_equals_float64(part, backend, te_names):
    fields, known = PARTS[part]
    model = build(config(attention_backend=backend, **fields), te_names)
    compare(model, Shape(LAYERS, HEADS, GROUPS, **known))
    counted = gpt_parameter_count(model.config, VOCAB, LENGTH, "rope")
    assert counted == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("part", [part for part in PARTS if part != "none"])
def test_each_part_matters(part):
    """Without this, a reference that ignores a part would do as well."""
    fields, known = PARTS[part]
    weights = {name: p.detach().double() for name, p in build(config(**fields)).named_parameters()}
    with_it, without = (logits(weights, TOKENS, Shape(LAYERS, HEADS, GROUPS, **k)) for k in (known, {}))
    assert float((with_it - without).abs().max() / without.abs().max()) > 1e-4


RECOMPUTE = [
    {"recompute_granularity": "selective", "recompute_modules": modules}
    for modules in (["core_attn"], ["layernorm"], ["mlp"], ["core_attn", "layernorm", "mlp"])
] + [{"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}]


@pytest.mark.parametrize("recompute", RECOMPUTE, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_recompute_changes_nothing(recompute, bias):
    """Also where the MLP's bias is added inside what is recomputed: after the norm there, too."""
    fields = {"post_norm": True, "attn_logit_softcapping": 0.7, "add_bias_linear": bias}
    gradients = []
    for extra in ({}, recompute):
        model = build(config(**fields, **extra))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
        model(TOKENS, None, None, labels=LABELS).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-6, name)


def test_parameters_have_the_documented_names():
    names = {n for n, _ in build(config(num_layers=1, post_norm=True)).decoder.layers[0].named_parameters()}
    assert {"post_attn_norm.weight", "post_mlp_layernorm.weight", "input_layernorm.weight"} <= names


@pytest.mark.parametrize(
    "field",
    [
        "embedding_multiplier_scale",
        "output_multiplier_scale",
        "attn_logit_softcapping",
        "output_logit_softcapping",
    ],
)
def test_factors_and_caps_must_be_positive(field):
    with pytest.raises(ConfigError, match=f"{field}: 0; it must be positive"):
        config(**{field: 0})


def test_half_precision_stays_half_precision():
    fields = {"post_norm": True, "embedding_multiplier_scale": 5.7, "output_multiplier_scale": 0.5}
    fields |= {"attn_logit_softcapping": 30.0, "output_logit_softcapping": 20.0}
    half = build(config(bf16=True, params_dtype=torch.bfloat16, **fields))
    found = half(TOKENS, None, None)
    assert found.dtype == torch.bfloat16
    weights = {name: p.detach().double() for name, p in half.named_parameters()}
    shape = Shape(LAYERS, HEADS, GROUPS, "silu", True, 5.7, 0.5, 30.0, 20.0)
    close(found, logits(weights, TOKENS, shape), 5e-2, "logits")
