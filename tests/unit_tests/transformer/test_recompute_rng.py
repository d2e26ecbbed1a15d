"""Dropout under recomputation: the second run draws what the first drew; gradients are the same bits."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

PARTS = ["core_attn", "layernorm", "mlp"]
POLICIES = {
    **{part: {"recompute_granularity": "selective", "recompute_modules": [part]} for part in PARTS},
    "all parts": {"recompute_granularity": "selective", "recompute_modules": PARTS},
    **{
        f"{method} {count}": {
            "recompute_granularity": "full",
            "recompute_method": method,
            "recompute_num_layers": count,
        }
        for method, count in (("uniform", 1), ("uniform", 2), ("uniform", 3), ("block", 1), ("block", 9))
    },
}


def gradients(backend=AttnBackend.auto, make_spec=get_gpt_layer_local_spec, **fields):
    torch.manual_seed(8)
    model_parallel_cuda_manual_seed(8)
    config = TransformerConfig(
        num_layers=3,
        hidden_size=16,
        num_attention_heads=2,
        hidden_dropout=0.2,
        attention_dropout=0.3,
        init_method_std=0.3,
        attention_backend=backend,
        **fields,
    )
    model = GPTModel(config, make_spec(), 32, 24)
    tokens = torch.arange(48).view(2, 24) % 32
    positions = torch.arange(24).expand(2, 24)
    loss = model(tokens, positions, None, labels=tokens).mean()
    loss.backward()
    states = {"default": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}, states


def assert_same(found, expected):
    for part in (1, 2):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            assert torch.equal(found[part][name], value), name
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("backend", [AttnBackend.auto, AttnBackend.unfused], ids=lambda b: b.name)
@pytest.mark.parametrize("policy", POLICIES)
def test_same_bits(policy, backend):
    plain = gradients(backend)
    assert_same(gradients(backend, **POLICIES[policy]), plain)


@pytest.mark.parametrize("policy", POLICIES)
def test_norms_inside_linear_layers_are_recomputed_alone_where_asked(policy):
    model_parallel_cuda_manual_seed(8)
    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, **POLICIES[policy])
    model = GPTModel(config, get_gpt_layer_with_transformer_engine_spec(), 32, 24)
    alone = {module.recompute_norm for module in model.modules() if hasattr(module, "recompute_norm")}
    assert alone == {policy in ("layernorm", "all parts")}


def test_same_bits_with_norm_inside_linear():
    make_spec = get_gpt_layer_with_transformer_engine_spec
    assert_same(gradients(make_spec=make_spec, **POLICIES["all parts"]), gradients(make_spec=make_spec))


def test_dropout_is_on():
    """Otherwise the tests above would hold without any replay."""
    first, second = gradients(), gradients(layernorm_epsilon=1e-5)
    assert torch.equal(first[0], second[0])
    config = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, hidden_dropout=0.2, attention_dropout=0.3
    )
    model_parallel_cuda_manual_seed(8)
    model = GPTModel(config, get_gpt_layer_local_spec(), 32, 24)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    runs = [model(tokens, torch.arange(8)[None], None) for _ in range(2)]
    assert not torch.equal(*runs)
    model.eval()
    runs = [model(tokens, torch.arange(8)[None], None) for _ in range(2)]
    assert torch.equal(*runs)


def test_streams_that_dropout_draws_from():
    """Attention dropout moves the model-parallel stream only, hidden dropout the default one only."""

    def moved(**dropouts):
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, **dropouts)
        model = GPTModel(config, get_gpt_layer_local_spec(), 32, 24)

        def states():
            return {"default": torch.get_rng_state(), **get_cuda_rng_tracker().get_states()}

        before = states()
        model(torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None], None)
        return {name for name, state in states().items() if not torch.equal(state, before[name])}

    assert moved(attention_dropout=0.0, hidden_dropout=0.0) == set()
    assert moved(attention_dropout=0.1, hidden_dropout=0.0) == {"model-parallel-rng"}
    assert moved(attention_dropout=0.0, hidden_dropout=0.1) == {"default"}


def test_recomputation_under_transformer_engines_name():
    model_parallel_cuda_manual_seed(8)
    x = torch.randn(4, 3, requires_grad=True)

    def scaled(hidden, mask, context, context_mask, angles):
        assert (mask, context, context_mask) == (None, None, None)
        return F.dropout(hidden * angles, 0.5)

    out = te_checkpoint(scaled, False, get_cuda_rng_tracker, None, x, None, None, None, torch.full((), 3.0))
    out.sum().backward()
    assert torch.equal(x.grad, (out != 0) * 6.0)
    assert 0 < int((out != 0).sum()) < 12
