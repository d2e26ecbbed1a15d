"""Weight gradients that layers add to main_grad themselves: the same bits as through the wrapper's hooks."""

import pytest
import torch

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig


def main_grads(fused, tied, dtype, recompute):
    model_parallel_cuda_manual_seed(6)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        hidden_dropout=0.1,
        attention_dropout=0.1,
        init_method_std=0.3,
        gradient_accumulation_fusion=fused,
        bf16=dtype is torch.bfloat16,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )
    spec = get_gpt_layer_local_spec()
    model = GPTModel(config, spec, 24, 8, share_embeddings_and_output_weights=tied)
    if config.bf16:
        model = Float16Module(config, model)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, settings, model)
    wrapped.zero_grad_buffer()
    for micro_batch in range(3):
        tokens = (torch.arange(16).view(2, 8) * (micro_batch + 1)) % 24
        wrapped(tokens, torch.arange(8).expand(2, 8), None, labels=tokens).mean().backward()
    return {name: parameter.main_grad.clone() for name, parameter in wrapped.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits(tied, dtype, recompute):
    fused, plain = (main_grads(fusion, tied, dtype, recompute) for fusion in (True, False))
    assert fused.keys() == plain.keys()
    for name, expected in plain.items():
        assert expected.any(), name
        if tied and name.endswith("word_embeddings.weight"):
            # Two uses: their sum is rounded once less when they reach main_grad one by one.
            bound = 1e-2 if dtype is torch.bfloat16 else 1e-6
            assert (fused[name] - expected).norm() <= bound * expected.norm(), name
        else:
            assert torch.equal(fused[name], expected), name
