"""Layer options that no golden figure covers, each by its own definition; half precision against fp32."""

import pytest
import torch
import torch.nn.functional as F

from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import L2Norm, WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

H, HEADS = 16, 2
TOKENS = torch.arange(24).view(2, 12) % 11
POSITIONS = torch.arange(12).expand(2, 12)


def make_config(**fields):
    defaults = {
        "num_layers": 2,
        "hidden_size": H,
        "num_attention_heads": HEADS,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.3,
    }
    return TransformerConfig(**defaults | fields)


def make_model(config, seed=5, **arguments):
    model_parallel_cuda_manual_seed(seed)
    return GPTModel(config, get_gpt_decoder_block_spec(config, False), 11, 12, **arguments)


def make_layer(**fields):
    model_parallel_cuda_manual_seed(5)
    return build_module(get_gpt_layer_local_spec(), config=make_config(**fields), layer_number=1)


def test_residual_after_the_norm():
    layer = make_layer(apply_residual_connection_post_layernorm=True)
    x = torch.randn(6, 2, H)
    normed = layer.input_layernorm(x)
    out, bias = layer.self_attention(normed, None)
    h = normed + out + bias
    normed = layer.pre_mlp_layernorm(h)
    out, bias = layer.mlp(normed)
    torch.testing.assert_close(layer(x)[0], normed + out + bias)


@pytest.mark.parametrize("post", [False, True])
def test_fp32_residual_stream(post):
    config = make_config(
        bf16=True,
        params_dtype=torch.bfloat16,
        fp32_residual_connection=True,
        apply_residual_connection_post_layernorm=post,
    )
    model = make_model(config)
    seen = []
    for layer in model.decoder.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    logits = model(TOKENS, POSITIONS, None)
    assert seen == [torch.float32, torch.float32]
    assert logits.dtype == torch.bfloat16
    logits.sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_fp32_residual_is_closer_to_fp32():
    def logits(**fields):
        config = make_config(num_layers=16, **fields)
        model = make_model(config)
        reference = make_model(make_config(num_layers=16))
        # The same weights, rounded to bf16.
        rounded = {n: None if v is None else v.bfloat16() for n, v in reference.state_dict().items()}
        model.load_state_dict(rounded)
        return model(TOKENS, POSITIONS, None).float()

    half = {"bf16": True, "params_dtype": torch.bfloat16}
    exact = make_model(make_config(num_layers=16))
    exact.load_state_dict({n: None if v is None else v.bfloat16() for n, v in exact.state_dict().items()})
    exact = exact(TOKENS, POSITIONS, None)
    wide = (logits(**half, fp32_residual_connection=True) - exact).norm()
    narrow = (logits(**half) - exact).norm()
    assert wide < 0.8 * narrow


@pytest.mark.parametrize("fusion", [False, True])
def test_gate_in_the_second_half(fusion):
    """x1-style MLP: out = a * gelu(b); the same as a gate in front with the halves of fc1 swapped."""
    config = make_config(gated_linear_unit=True, glu_gate_last=True, bias_activation_fusion=fusion)
    model_parallel_cuda_manual_seed(1)
    mlp = build_module(get_gpt_layer_local_spec().submodules.mlp, config=config)
    with torch.no_grad():
        mlp.linear_fc1.bias.normal_()
    x = torch.randn(4, 2, H)
    a, b = F.linear(x, mlp.linear_fc1.weight, mlp.linear_fc1.bias).chunk(2, -1)
    inner = a * F.gelu(b, approximate="tanh" if fusion else "none")
    out, bias = mlp(x)
    torch.testing.assert_close(out + bias, F.linear(inner, mlp.linear_fc2.weight, mlp.linear_fc2.bias))


@pytest.mark.parametrize("activation", [F.silu, F.relu])
@pytest.mark.parametrize("gate_last", [False, True])
def test_other_gated_activations(activation, gate_last):
    config = make_config(gated_linear_unit=True, glu_gate_last=gate_last, activation_func=activation)
    model_parallel_cuda_manual_seed(1)
    mlp = build_module(get_gpt_layer_local_spec().submodules.mlp, config=config)
    x, scale = torch.randn(4, 2, H), torch.rand(4, 2)
    gate, up = F.linear(x, mlp.linear_fc1.weight).chunk(2, -1)
    if gate_last:
        gate, up = up, gate
    inner = activation(gate) * up * scale.unsqueeze(-1)
    torch.testing.assert_close(mlp(x, scale)[0], F.linear(inner, mlp.linear_fc2.weight))


@pytest.mark.parametrize("te_names", [False, True], ids=["local", "te"])
@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_zero_centred_gamma(normalization, te_names):
    spec = get_gpt_layer_with_transformer_engine_spec() if te_names else get_gpt_layer_local_spec()
    fields = {"normalization": normalization, "perform_initialization": True}

    def build(zero_centred):
        model_parallel_cuda_manual_seed(4)
        config = make_config(layernorm_zero_centered_gamma=zero_centred, **fields)
        return GPTModel(config, spec, 11, 12)

    plain, centred = build(False), build(True)
    for (name, ours), theirs in zip(plain.named_parameters(), centred.parameters(), strict=True):
        is_scale = ours.dim() == 1 and name.endswith("weight")
        torch.testing.assert_close(ours, theirs + 1 if is_scale else theirs)
    torch.testing.assert_close(plain(TOKENS, POSITIONS, None), centred(TOKENS, POSITIONS, None))


def test_norm_choice_and_refusals():
    assert WrappedTorchNorm(make_config(normalization="RMSNorm"), 4).weight.shape == (4,)
    assert not hasattr(WrappedTorchNorm(make_config(normalization="RMSNorm"), 4), "bias")
    x = torch.randn(3, 4)
    expected = x / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(L2Norm(4)(x), expected.float())


def test_unbiased_init_and_scaled_outputs():
    config = make_config(num_layers=8, hidden_size=128, num_attention_heads=4, init_method_std=0.5)
    model = make_model(config)
    layer = model.decoder.layers[3]
    for weight, std in (
        (model.embedding.word_embeddings.weight, 0.5),
        (model.embedding.position_embeddings.weight, 0.5),
        (model.output_layer.weight, 0.5),
        (layer.self_attention.linear_qkv.weight, 0.5),
        (layer.mlp.linear_fc1.weight, 0.5),
        (layer.self_attention.linear_proj.weight, 0.125),
        (layer.mlp.linear_fc2.weight, 0.125),
    ):
        error = 4 * std / (2 * weight.numel()) ** 0.5
        assert float(weight.detach().std()) == pytest.approx(std, abs=error)
        assert abs(float(weight.detach().mean())) < 4 * std / weight.numel() ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [AttnBackend.auto, AttnBackend.unfused], ids=lambda b: b.name)
@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_half_precision_stays_near_fp32(dtype, backend, style):
    fields = {
        "attention_backend": backend,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "init_method_std": 0.1,
    }
    arguments = {}
    if style == "llama":
        fields |= {
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "add_bias_linear": False,
            "num_query_groups": 2,
        }
        arguments = {"position_embedding_type": "rope"}
    else:
        fields["bias_activation_fusion"] = True
    reference = make_model(make_config(**fields), **arguments)
    half_config = make_config(**fields, bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16)
    half = make_model(half_config, **arguments)
    half = Float16Module(half_config, half)
    for parameter, wide in zip(half.parameters(), reference.parameters(), strict=True):
        assert parameter.dtype == dtype
        wide.data.copy_(parameter.data)
    losses = []
    for model in (reference, half):
        loss = model(TOKENS, POSITIONS, None, labels=TOKENS).mean()
        assert loss.dtype == torch.float32
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if dtype is torch.bfloat16 else 1.5e-3)
    limit = 0.1 if dtype is torch.bfloat16 else 0.015
    for (name, narrow), wide in zip(half.named_parameters(), reference.parameters(), strict=True):
        error = (narrow.grad.float() - wide.grad).norm() / wide.grad.norm()
        assert error < limit, (name, float(error))
    assert half(TOKENS, POSITIONS, None).dtype == torch.float32


def test_half_precision_loss_on_request():
    config = make_config(bf16=True, params_dtype=torch.bfloat16)
    model = make_model(config, fp16_lm_cross_entropy=True)
    assert model(TOKENS, POSITIONS, None, labels=TOKENS).dtype == torch.bfloat16


def test_state_dicts_pass_through_the_half_precision_wrapper():
    config = make_config(bf16=True)
    wrapped = Float16Module(config, make_model(config))
    state = wrapped.state_dict()
    assert "decoder.final_layernorm.weight" in state
    wrapped.load_state_dict(state)
    assert wrapped.state_dict_for_save_checkpoint().keys() == state.keys()


def test_slots_build_what_they_name():
    layer = make_layer()
    assert isinstance(layer, TransformerLayer)
    assert isinstance(layer.self_attention, SelfAttention)
    assert isinstance(layer.mlp, MLP)
    by_path = ModuleSpec(module=("megatron.core.transformer.torch_norm", "L2Norm"), params={"eps": 0.25})
    assert build_module(by_path, hidden_size=3).eps == 0.25
    with pytest.raises(TypeError, match="when instantiating L2Norm"):
        build_module(by_path, width=3)


def test_what_is_not_built_says_so():
    with pytest.raises(NotBuiltYetError, match="mrope"):
        make_model(make_config(), position_embedding_type="mrope")
    with pytest.raises(ConfigError, match="learned_absolute"):
        make_model(make_config(), position_embedding_type="absolute")
    submodules = TransformerLayerSubmodules(cross_attention=SelfAttention)
    with pytest.raises(NotBuiltYetError, match="cross attention"):
        TransformerLayer(make_config(), submodules)
    with pytest.raises(NotBuiltYetError, match="cache"):
        make_model(make_config())(TOKENS, POSITIONS, None, inference_context=object())
