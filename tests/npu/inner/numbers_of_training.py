"""Level 2, a whole model: ten steps with every replacement give the losses of ten steps without any."""

import collections
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import megatron_npu
from megatron.core import overrides, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer.adamw import Adam
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron_npu.registry import replacements
from tests.npu.cpu_kernels import install_on_cpu

install_on_cpu()
VOCABULARY, LENGTH, STEPS = 64, 32, 10

# Models that together pass through every point of a layer; the kernel of the softmax is for half precision.
MODELS = {
    "llama": dict(
        normalization="RMSNorm", gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        num_query_groups=2, bias_activation_fusion=True,
    ),
    "gpt2 in bf16": dict(
        bias_activation_fusion=True, attention_backend=AttnBackend.unfused, masked_softmax_fusion=True,
        bf16=True, params_dtype=torch.bfloat16,
    ),
    "exact gelu, gated": dict(gated_linear_unit=True, bias_activation_fusion=False),
    "exact gelu": dict(bias_activation_fusion=False),
}  # fmt: skip
EXPECTED = {
    "llama": {"fused_attention", "rms_norm", "swiglu", "rotary", "cross_entropy", "adamw_step"},
    "gpt2 in bf16": {"scaled_masked_softmax", "bias_gelu_impl"},
    "exact gelu, gated": {"fused_attention", "gated_gelu", "cross_entropy", "adamw_step"},
    "exact gelu": {"fused_attention", "gelu", "cross_entropy", "adamw_step"},
}


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build(kind: str) -> GPTModel:
    torch.manual_seed(7)
    model_parallel_cuda_manual_seed(7)
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, attention_dropout=0.0,
        hidden_dropout=0.0, use_cpu_initialization=True, **MODELS[kind],
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    embedding = "rope" if kind == "llama" else "learned_absolute"
    return GPTModel(config, spec, VOCABULARY, LENGTH, position_embedding_type=embedding)


def train(kind: str) -> list[float]:
    model, losses = build(kind), []
    optimizer = Adam(list(model.parameters()), lr=2e-3)
    generator = torch.Generator().manual_seed(11)
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (2, LENGTH + 1), generator=generator)
        tokens[:, 1::2] = tokens[:, :-1:2]  # something to learn
        positions = torch.arange(LENGTH).expand(2, -1)
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
        for param in model.parameters():
            param.grad = None
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", EXPECTED)
def test_training_gives_the_same_losses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides.import_all_points()
    overrides.disable("all")
    wanted = train(kind)
    overrides.enable_all()
    megatron_npu.activate()
    calls = collections.Counter()
    for replacement in replacements().values():

        def counted(*args, _function=replacement.function, _name=replacement.name, **kwargs):
            calls[_name] += 1
            return _function(*args, **kwargs)

        monkeypatch.setattr(replacement, "function", counted)
    found = train(kind)
    assert set(calls) == EXPECTED[kind]
    assert found == pytest.approx(wanted, rel=2e-2 if "bf16" in kind else 1e-4)
    assert found[-1] < found[0]
