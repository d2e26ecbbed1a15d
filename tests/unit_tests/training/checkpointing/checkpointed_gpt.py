"""A real run in miniature: the tiny LLaMA of the golden checkpoints, with all that a checkpoint holds."""

import argparse
from typing import Any

import torch

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import checkpointing

VOCABULARY, LENGTH, BATCH = 64, 16, 4


class GPTRun:
    """Model, wrapper, optimizer and schedule of one process.

    Args:
        args: what the checkpoint code reads; changed as a training loop would.
        precision: fp32, bf16 or fp16.
        dropout: probability, in attention and elsewhere.
        seed: of weights and dropout.
        layer: ``local`` or ``transformer_engine`` names of parameters.
        biases: linear biases and LayerNorm instead of neither and RMSNorm.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        precision: str = "fp32",
        dropout: float = 0.0,
        seed: int = 1234,
        layer: str = "local",
        biases: bool = False,
    ):
        torch.manual_seed(seed)
        checkpointing.state.get_cuda_rng_tracker().reset()
        model_parallel_cuda_manual_seed(seed)
        half = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}[precision]
        self.args = args
        args.fp16, args.bf16 = half.get("fp16", False), half.get("bf16", False)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        config = TransformerConfig(
            num_layers=2,
            hidden_size=16,
            num_attention_heads=4,
            num_query_groups=2,
            ffn_hidden_size=32,
            normalization="LayerNorm" if biases else "RMSNorm",
            activation_func=torch.nn.functional.silu,
            gated_linear_unit=True,
            add_bias_linear=biases,
            hidden_dropout=dropout,
            attention_dropout=dropout,
            params_dtype=dtype,
            **half,
        )
        spec = getattr(gpt_layer_specs, f"get_gpt_layer_{'with_' if layer != 'local' else ''}{layer}_spec")
        settings = {"normalization": config.normalization} if layer == "local" else {}
        self.gpt = GPTModel(
            config,
            spec(**settings),
            VOCABULARY,
            LENGTH,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        wrapped = Float16Module(config, self.gpt) if half else self.gpt
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=bool(half))
        self.model = [DistributedDataParallel(config, ddp_config, wrapped)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=0.01,
                min_lr=0.001,
                weight_decay=0.1,
                params_dtype=dtype,
                initial_loss_scale=2.0**20,
                loss_scale_window=3,
                **half,
            ),
            self.model,
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=0.01,
            min_lr=0.001,
            lr_warmup_steps=8,
            lr_decay_steps=16,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=16,
            wd_incr_style="constant",
        )

    def step(self) -> tuple[Any, ...]:
        """One training step on the batch that follows; (loss, success, norm)."""
        batch = torch.Generator().manual_seed(self.args.consumed_train_samples)
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=batch)
        positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
        chunk = self.model[0]
        chunk.train()
        chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = chunk(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
        loss = losses.float().mean()
        self.optimizer.scale_loss(loss).backward()
        finalize_model_grads(self.model)
        success, norm, _ = self.optimizer.step()
        if success:
            self.scheduler.step(BATCH)
        self.args.consumed_train_samples += BATCH
        return loss.item(), success, norm

    def save(self, iteration: int) -> None:
        checkpointing.save_checkpoint(iteration, self.model, self.optimizer, self.scheduler, 9437184.0)

    def load(self) -> tuple[int, float]:
        return checkpointing.load_checkpoint(self.model, self.optimizer, self.scheduler)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.gpt.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": checkpointing.get_rng_state("torch"),
        }

    def names_by_number(self) -> list[str]:
        """Parameter names in the order of the optimizer's state: decayed matrices, then the vectors."""
        named = list(self.gpt.named_parameters())
        groups = ([name for name, param in named if (param.dim() == 1) == flat] for flat in (False, True))
        return [name for group in groups for name in group]
