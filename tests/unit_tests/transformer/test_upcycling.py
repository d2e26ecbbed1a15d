"""A model with experts that starts from a dense one computes what the dense one does."""

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.core.models.gpt.family import layer_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.upcycling_utils import load_and_upcycle_model, upcycle_state_dict
from megatron.core.transformer.transformer_config import TransformerConfig

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24}
GROUPED = {**EXPERTS, "moe_grouped_gemm": True}


def model(te_names, seed, **fields):
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=4,
        ffn_hidden_size=24,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        init_method_std=0.2,
        **fields,
    )
    model_parallel_cuda_manual_seed(seed)
    made = GPTModel(config, layer_spec(config, te_names), 32, 8, position_embedding_type="rope").eval()
    for parameter in made.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return made


def logits(made):
    tokens = torch.arange(16).view(2, 8)
    with torch.no_grad():
        return made(tokens, torch.arange(8).expand_as(tokens), None)


@pytest.mark.parametrize("te_names", [False, True])
@pytest.mark.parametrize("fields", [EXPERTS, GROUPED, {**EXPERTS, "moe_layer_freq": [0, 1]}])
def test_equal_weights_that_add_up_to_one_change_nothing(te_names, fields):
    dense, mixed = model(te_names, 1), model(te_names, 2, **fields)
    assert not torch.allclose(logits(mixed), logits(dense), atol=1e-2)
    fresh = mixed.decoder.layers[1].mlp.router.weight.clone()

    def load(directory, *, step):
        return step, directory

    progress = load_and_upcycle_model(
        load, [mixed], [dense], load_args=("somewhere",), load_kwargs={"step": 7}
    )
    assert progress == (7, "somewhere")
    torch.testing.assert_close(logits(mixed), logits(dense))
    assert torch.equal(mixed.decoder.layers[1].mlp.router.weight, fresh)


def test_experts_are_copies_of_their_own():
    dense, mixed = model(False, 1), model(False, 2, **EXPERTS)
    mixed.load_state_dict(upcycle_state_dict([mixed], [dense])["model"])
    first, second = mixed.decoder.layers[0].mlp.experts.local_experts[:2]
    first.linear_fc1.weight.data.zero_()
    assert second.linear_fc1.weight.any() and dense.decoder.layers[0].mlp.linear_fc1.weight.any()


def test_chunks_are_named_as_in_checkpoints():
    dense, mixed = model(False, 1), model(False, 2, **EXPERTS)
    assert list(upcycle_state_dict([mixed, mixed], [dense, dense])) == ["model0", "model1"]
    with pytest.raises(ConfigError, match="2 chunks with experts, but 1 dense"):
        upcycle_state_dict([mixed, mixed], [dense])


@pytest.mark.parametrize("kind", [EXPERTS, GROUPED])
def test_experts_of_another_width_are_refused(kind):
    narrow = model(False, 2, **{**kind, "moe_ffn_hidden_size": 20})
    with pytest.raises(ConfigError, match="moe_ffn_hidden_size"):
        upcycle_state_dict([narrow], [model(False, 1)])
