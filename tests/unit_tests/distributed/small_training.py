"""A tiny model trained by the library on several ranks, and by plain torch in float64 on one."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

WIDTH, LAYERS, BATCH = 12, 3, 16
SETTINGS = {"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "clip_grad": 0.3}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True, "initial_loss_scale": 64.0},
}


class Net(MegatronModule):
    """Linear layers with norms, sizes that no alignment divides, and one parameter of gradient zero."""

    def __init__(self, config: Any = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(LAYERS))
        self.idle = torch.nn.Parameter(torch.zeros(5))
        self.head = torch.nn.Linear(WIDTH, 1, bias=False)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator).to(dtype) * 0.5

    def forward(self, x: Tensor) -> Tensor:
        """[n, WIDTH] -> [n, 1]"""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + torch.tanh(layer(norm(x)))
        return self.head(x) + 0.0 * self.idle.sum()


def batch_of(step: int) -> Tensor:
    """[BATCH, WIDTH] inputs of a step; the target is their first column."""
    return torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(100 + step))


def losses_of(net: torch.nn.Module, x: Tensor) -> Tensor:
    """[n, WIDTH] -> [n]"""
    return (net(x).squeeze(-1) - x[:, 0]).float() ** 2


def make_config(**changes: Any) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, **changes)


class Training:
    """The model on this rank of a world that is all data-parallel (times context-parallel, if asked)."""

    def __init__(
        self,
        ddp: dict[str, Any],
        precision: str = "fp32",
        settings: dict[str, Any] | None = None,
        per_token: bool = False,
        module: torch.nn.Module | None = None,
    ) -> None:
        if dist.is_initialized() and not parallel_state.is_initialized():
            parallel_state.initialize_model_parallel()
        self.ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True) or 1
        self.rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        self.precision, self.per_token = precision, per_token
        config = make_config(calculate_per_token_loss=per_token)
        self.module = Net(config, DTYPES[precision]) if module is None else module
        self.model = DistributedDataParallel(config, DistributedDataParallelConfig(**ddp), self.module)
        self.config = OptimizerConfig(
            **{
                **SETTINGS,
                **PRECISIONS[precision],
                "use_distributed_optimizer": ddp.get("use_distributed_optimizer", False),
                **(settings or {}),
            }
        )
        self.optimizer = get_megatron_optimizer(self.config, [self.model])

    def backward(self, step: int, microbatches: int = 2) -> None:
        """Gradients of this rank's share of the batch, reduced."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        share = batch_of(step).chunk(self.ranks)[self.rank].to(DTYPES[self.precision])
        pieces = share.chunk(microbatches)
        with self.model.no_sync():
            for piece in pieces[:-1]:
                self._backward_one(piece, microbatches)
        self._backward_one(pieces[-1], microbatches)
        finalize_model_grads([self.model], torch.tensor(len(share)) if self.per_token else None)

    def _backward_one(self, piece: Tensor, microbatches: int) -> None:
        losses = losses_of(self.model, piece)
        loss = losses.sum() if self.per_token else losses.mean() / microbatches
        self.optimizer.scale_loss(loss).backward()

    def step(self, number: int, microbatches: int = 2) -> tuple[bool, float | None, float | None]:
        self.backward(number, microbatches)
        return self.optimizer.step()

    def gradients(self) -> dict[str, Tensor]:
        """Reduced gradients by name, put together from all ranks' shards where they are sharded."""
        found = {}
        for buffer in self.model.buffers + self.model.expert_parallel_buffers:
            whole = buffer.grad_data.clone()
            if self.model.ddp_config.use_distributed_optimizer and self.ranks > 1:
                for bucket in buffer.buckets:
                    size = bucket.grad_data.numel() // self.ranks
                    pieces = [torch.empty(size, dtype=whole.dtype) for _ in range(self.ranks)]
                    own = bucket.grad_data[self.rank * size : (self.rank + 1) * size]
                    dist.all_gather(pieces, own.clone(), group=buffer.data_parallel_group)
                    whole[bucket.offset : bucket.offset + bucket.grad_data.numel()] = torch.cat(pieces)
            for param, (start, end, _) in buffer.param_index_map.items():
                found[buffer.param_to_name[param]] = whole[start:end].view(param.shape)
        return found

    def parameters(self) -> dict[str, Tensor]:
        if self.model.ddp_config.overlap_param_gather:
            self.model.disable_forward_pre_hook()
            self.model.enable_forward_pre_hook()
        return {name: param.detach().clone() for name, param in self.module.named_parameters()}


def reference(steps: int, settings: dict[str, Any] | None = None) -> tuple[list[dict], list[float], dict]:
    """Plain torch in float64, the whole batch at once.

    Returns:
        Gradients of each step before clipping, their norms, parameters at the end.
    """
    values = {**SETTINGS, **(settings or {})}
    net = Net().double()
    decayed = [param for param in net.parameters() if param.dim() > 1]
    others = [param for param in net.parameters() if param.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": values["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=values["lr"],
        betas=(0.9, values["adam_beta2"]),
    )
    gradients, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        losses_of_double(net, batch_of(step).double()).mean().backward()
        for param in net.parameters():
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        gradients.append({name: param.grad.clone() for name, param in net.named_parameters()})
        norms.append(torch.cat([param.grad.flatten() for param in net.parameters()]).norm().item())
        if values["clip_grad"] > 0:
            torch.nn.utils.clip_grad_norm_(net.parameters(), values["clip_grad"])
        optimizer.step()
    return gradients, norms, {name: param.detach() for name, param in net.named_parameters()}


def losses_of_double(net: torch.nn.Module, x: Tensor) -> Tensor:
    return (net(x).squeeze(-1) - x[:, 0]) ** 2
