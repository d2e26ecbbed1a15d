"""Train a GPT with megatron.core alone: no flags, no launcher, no training loop of ours.

Shows the parts a program of one's own puts together: process groups, model, data, schedule, optimizer.
Run: python examples/train_gpt_with_core.py [steps]
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils.data import DataLoader

from megatron.core import accelerator, parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.tokenizer.tokenizer import _NullTokenizer

SEQ_LENGTH, VOCAB_SIZE, MICRO_BATCH_SIZE, NUM_MICROBATCHES = 64, 4224, 4, 2


def initialize() -> None:
    """One process in a world of its own, seeded."""
    accelerator.set_device(0)
    torch.distributed.init_process_group(
        accelerator.collective_backend(), store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)


def build_model() -> DistributedDataParallel:
    """A two-layer GPT whose gradients are collected in one buffer."""
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQ_LENGTH,
        share_embeddings_and_output_weights=True,
    )
    return DistributedDataParallel(
        config, DistributedDataParallelConfig(), model.to(accelerator.current_device())
    )


def build_data(num_samples: int) -> DataLoader:
    """Mock documents that count upwards; a real data set needs ``blend=([prefix], None)`` and a split."""
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQ_LENGTH,
        tokenizer=_NullTokenizer(VOCAB_SIZE - 1),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    train, _, _ = BlendedMegatronDatasetBuilder(
        MockGPTDataset, [num_samples, None, None], lambda: True, config
    ).build()
    assert train is not None, "every rank asks for data"
    return DataLoader(train, batch_size=MICRO_BATCH_SIZE)


def loss_func(loss_mask: torch.Tensor, losses: torch.Tensor):
    """Sum of the token losses, their number, and what to report."""
    total, count = (losses * loss_mask).sum(), loss_mask.sum().long()
    return total, count, {"loss": (total.detach(), count)}


def forward_step(data_iterator, model):
    """One micro-batch: token losses [b, s], and the function that sums them."""
    batch = {key: value.to(accelerator.current_device()) for key, value in next(data_iterator).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(loss_func, batch["loss_mask"])


def main(steps: int) -> None:
    initialize()
    model = build_model()
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-2, weight_decay=0.0), [model])
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = finalize_model_grads
    data = iter(build_data(steps * MICRO_BATCH_SIZE * NUM_MICROBATCHES))
    for step in range(1, steps + 1):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data,
            model=model,
            num_microbatches=NUM_MICROBATCHES,
            seq_length=SEQ_LENGTH,
            micro_batch_size=MICRO_BATCH_SIZE,
        )
        _, grad_norm, _ = optimizer.step()
        total, count = (sum(report["loss"][i] for report in reports) for i in (0, 1))
        print(f"step {step}: loss {float(total / count):.4f}, gradient norm {grad_norm:.4f}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
