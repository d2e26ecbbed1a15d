"""Settings of the optimizer, and the rules they must keep."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron.core.errors import ConfigError

OPTIMIZERS = ("adam", "sgd")
_STATE_DTYPES = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")


@dataclass
class OptimizerConfig:
    """Settings of :func:`megatron.core.optimizer.get_megatron_optimizer`.

    Raises:
        ConfigError: rules broken by these values, all of them in one message.
    """

    optimizer: str = "adam"
    """``adam`` (AdamW: decoupled weight decay) or ``sgd`` (momentum, weight decay added to the gradient)."""
    lr: float | None = None
    """Peak learning rate."""
    min_lr: float | None = None
    """Floor of the learning rate."""
    decoupled_lr: float | None = None
    """Peak rate of the word embeddings and the untied output layer, if they have one of their own."""
    decoupled_min_lr: float | None = None
    """Floor of that rate; ``min_lr`` if unset."""
    weight_decay: float = 0.01
    """Weight decay at the start; the scheduler may change it."""

    fp16: bool = False
    """Parameters in fp16, with loss scaling."""
    bf16: bool = False
    """Parameters in bf16."""
    params_dtype: torch.dtype = torch.float32
    """Type of the model's parameters."""

    use_precision_aware_optimizer: bool = False
    """Optimizer state in the four types below instead of fp32."""
    main_grads_dtype: torch.dtype = torch.float32
    """Type of the main gradients."""
    main_params_dtype: torch.dtype = torch.float32
    """Type of the main parameters."""
    exp_avg_dtype: torch.dtype = torch.float32
    """Type of Adam's first moment."""
    exp_avg_sq_dtype: torch.dtype = torch.float32
    """Type of Adam's second moment."""

    loss_scale: float | None = None
    """Constant loss scale; unset means a dynamic one for fp16 and none otherwise."""
    initial_loss_scale: float = 2**32
    """First value of the dynamic scale."""
    min_loss_scale: float = 1.0
    """Floor of the dynamic scale."""
    loss_scale_window: float = 1000
    """Clean steps in a row before the dynamic scale doubles."""
    hysteresis: int = 2
    """Overflows before the dynamic scale halves."""

    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-08
    """Term added to Adam's denominator."""
    sgd_momentum: float = 0.9
    """Momentum of SGD."""

    use_distributed_optimizer: bool = False
    """Optimizer state sharded over the data-parallel ranks."""
    overlap_param_gather_with_optimizer_step: bool = False
    """Gather the first chunk's parameters while the others are stepped."""

    optimizer_cpu_offload: bool = False
    """Keep the optimizer's state and its step on the host."""
    optimizer_offload_fraction: float = 0.0
    """Share of the state kept on the host."""
    use_torch_optimizer_for_cpu_offload: bool = False
    """Step on the host with torch's optimizers."""
    overlap_cpu_optimizer_d2h_h2d: bool = False
    """Overlap the host's step with copies to and from it."""
    pin_cpu_grads: bool = True
    """Pinned memory for gradients on the host."""
    pin_cpu_params: bool = True
    """Pinned memory for parameters on the host."""

    clip_grad: float = 1.0
    """Threshold of the global L2 norm of the gradients; 0 leaves them as they are."""
    log_num_zeros_in_grad: bool = False
    """Count the exact zeros among the gradients."""
    barrier_with_L1_time: bool = False
    """Barrier before timers of level 1."""
    timers: Callable | None = None
    """A :class:`megatron.core.timers.Timers`, or None."""
    config_logger_dir: str = ""
    """Directory for a JSON dump of configurations; empty for none."""

    def __post_init__(self) -> None:
        problems = find_problems(self)
        if problems:
            raise ConfigError("optimizer settings: " + "; ".join(problems))


def find_problems(config: OptimizerConfig) -> list[str]:
    """Every rule that ``config`` breaks: what was found, and what would work."""
    broken = [
        (
            config.optimizer not in OPTIMIZERS,
            f"optimizer {config.optimizer!r} is not one of {', '.join(OPTIMIZERS)}",
        ),
        (config.fp16 and config.bf16, "fp16 and bf16 exclude each other: choose one"),
        (
            config.lr is not None and config.min_lr is not None and config.min_lr > config.lr,
            f"min_lr {config.min_lr} is above lr {config.lr}: lower it to {config.lr} or less",
        ),
        (config.clip_grad < 0, f"clip_grad {config.clip_grad} is negative: 0 switches clipping off"),
        (
            config.loss_scale is not None and config.loss_scale <= 0,
            f"loss_scale {config.loss_scale} must be positive (leave it out for a dynamic one)",
        ),
    ]
    return [message for is_broken, message in broken if is_broken] + _precision_problems(config)


def _precision_problems(config: OptimizerConfig) -> list[str]:
    """Rules of the state's types."""
    if not config.use_precision_aware_optimizer:
        odd = [name for name in _STATE_DTYPES if getattr(config, name) != torch.float32]
        return [
            f"{name} {getattr(config, name)} needs use_precision_aware_optimizer: set it, or leave {name} "
            "fp32"
            for name in odd
        ]
    problems = []
    if config.optimizer != "adam":
        problems.append(f"use_precision_aware_optimizer works with adam, not with {config.optimizer}")
    if not config.use_distributed_optimizer:
        problems.append("use_precision_aware_optimizer needs use_distributed_optimizer")
    return problems
