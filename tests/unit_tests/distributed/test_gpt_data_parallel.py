"""A GPT with a tied embedding, data-parallel, against the same model on the whole batch in plain autograd."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks

VOCABULARY, LENGTH, BATCH, STEPS = 64, 8, 8, 3
SHARDED = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bucket_size": 500,
}


def build(fused: bool) -> GPTModel:
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=16,
        num_attention_heads=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=fused,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        VOCABULARY,
        LENGTH,
        share_embeddings_and_output_weights=True,
    )


def loss_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """tokens: [b, LENGTH + 1] -> mean loss."""
    positions = torch.arange(LENGTH).expand(tokens.shape[0], -1)
    return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()


def batch_of(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)


def data_parallel(ddp: dict[str, Any], fused: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Norms of the gradients of each step, and the parameters at the end."""
    parallel_state.initialize_model_parallel()
    model = build(fused)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(**ddp), model)
    settings = {"use_distributed_optimizer": ddp.get("use_distributed_optimizer", False), "clip_grad": 0.5}
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, min_lr=1e-2, **settings), [wrapped])
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    norms = []
    for step in range(STEPS):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        first, second = batch_of(step).chunk(ranks)[rank].chunk(2)
        with wrapped.no_sync():
            (loss_of(wrapped, first) / 2).backward()
        (loss_of(wrapped, second) / 2).backward()
        finalize_model_grads([wrapped])
        norms.append(optimizer.step()[1])
    if ddp.get("overlap_param_gather"):
        wrapped.disable_forward_pre_hook()
    return norms, {name: param.detach() for name, param in model.named_parameters()}


def whole_batch() -> tuple[list[float], dict[str, Tensor]]:
    """The same on one rank, by torch's own optimizer and clipping."""
    parallel_state.initialize_model_parallel()
    model = build(False)
    matrices = [param for param in model.parameters() if param.dim() > 1]
    vectors = [param for param in model.parameters() if param.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2
    )
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch_of(step)).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
    return norms, {name: param.detach() for name, param in model.named_parameters()}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("ddp", [{}, SHARDED])
@pytest.mark.parametrize("ranks", [2, 4])
def test_equals_the_model_on_the_whole_batch(ranks: int, ddp: dict[str, Any], fused: bool) -> None:
    ((norms, expected),) = run_ranks(1, whole_batch)
    for own_norms, parameters in run_ranks(ranks, data_parallel, ddp, fused):
        assert own_norms == pytest.approx(norms, rel=1e-5)
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=2e-5, msg=name)
