"""What all optimizers of the library share, such as the order of a step, and the simplest one, for fp32."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import accelerator, parallel_state
from megatron.core.errors import ConfigError, NotBuiltYetError, UsageError
from megatron.core.optimizer.clip_grads import (
    clip_grad_by_total_norm_fp32,
    count_zeros_fp32,
    counts_once,
    get_grad_norm_fp32,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.torch_optimizers import load_inner_state
from megatron.core.timers import timed


def _create_nothing(optimizer: torch.optim.Optimizer) -> None:
    """The default ``init_state_fn``: state appears in the first step."""


class MegatronOptimizer(ABC):
    """A torch optimizer with main gradients, clipping and loss scaling around it.

    Args:
        optimizer: the torch optimizer that makes the update.
        config: settings.
        init_state_fn: creates the state of ``optimizer`` before its first step, for loaders that fill it in
            place.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        init_state_fn: Callable[[torch.optim.Optimizer], None] = _create_nothing,
    ):
        self.optimizer = optimizer
        self.config = config
        self.init_state_fn = init_state_fn
        self.is_stub_optimizer = False
        # Ranks that hold the other parts of what this optimizer updates; None for all of the model.
        self.grad_stats_parallel_group: dist.ProcessGroup | None = None

    @property
    def chained_optimizers(self) -> "list[MegatronOptimizer]":
        """The optimizers that step together: this one alone, or the members of a chain."""
        return [self]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of the torch optimizer, live."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """State of the torch optimizer by parameter, live."""
        return self.optimizer.state

    def get_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the torch optimizer updates: fp32 copies where the model's are not fp32."""
        return [param for group in self.param_groups for param in group["params"]]

    # --- the step -------------------------------------------------------------------------------------------

    def step(self) -> tuple[bool, float | None, float | None]:
        """Unscale and check, clip, count, update.

        Returns:
            (success, gradient norm before clipping, zeros among the gradients or None if nobody wants them);
            (False, None, None) when the gradients overflowed, and then nothing has been changed.

        Raises:
            UsageError: nobody has set a learning rate; nothing has been changed.
        """
        self.require_rates()
        if self.prepare_grads():
            return False, None, None
        with timed(self.config, "optimizer-clip-main-grad"):
            grad_norm = self.clip_grad_norm(self.config.clip_grad)
        num_zeros = None
        if self.config.log_num_zeros_in_grad:
            with timed(self.config, "optimizer-count-zeros"):
                num_zeros = self.count_zeros()
        return self.step_with_ready_grads(), grad_norm, num_zeros

    def require_rates(self) -> None:
        """Raises UsageError while a group with parameters has no learning rate."""
        if any(group["lr"] is None and group["params"] for group in self.param_groups):
            raise UsageError(
                "the optimizer has no learning rate: set OptimizerConfig.lr, for example to 1e-4, or "
                "let an OptimizerParamScheduler write one before the first step"
            )

    @abstractmethod
    def prepare_grads(self) -> bool:
        """Brings the model's gradients, unscaled, to the parameters of the torch optimizer, and updates the
        loss scale.

        Returns:
            True if they overflowed and the step must be skipped.
        """

    @abstractmethod
    def unscale_grads(self) -> bool:
        """The first half of :meth:`prepare_grads`: all of it but the loss scale's update."""

    @abstractmethod
    def update_loss_scale(self, found_inf: bool) -> None:
        """The second half: tells the loss scale whether gradients overflowed."""

    @abstractmethod
    def step_with_ready_grads(self) -> bool:
        """Updates the parameters with the prepared gradients; returns success."""

    @abstractmethod
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets autograd's gradients, ``param.grad``; the main gradients are the model wrapper's."""

    # --- statistics -----------------------------------------------------------------------------------------

    def get_main_grads_for_grad_norm(self) -> list[Tensor]:
        """Gradients that this rank counts: neither tied copies nor tensor-parallel duplicates."""
        return [
            param.grad for param in self.get_parameters() if param.grad is not None and counts_once(param)
        ]

    def get_grad_stats_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the other parts of the model; None before process groups exist."""
        if self.grad_stats_parallel_group is not None:
            return self.grad_stats_parallel_group
        if not parallel_state.model_parallel_is_initialized():
            return None
        return parallel_state.get_model_parallel_group()

    def get_grad_norm(self) -> float:
        """L2 norm of all gradients of the model."""
        return get_grad_norm_fp32(
            self.get_main_grads_for_grad_norm(),
            grad_stats_parallel_group=self.get_grad_stats_parallel_group(),
        )

    def clip_grad_norm(self, clip_grad: float) -> float:
        """Scales the gradients down to norm ``clip_grad`` (0: never) and returns their norm before."""
        norm = self.get_grad_norm()
        if clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(self.get_parameters(), clip_grad, norm)
        return norm

    def count_zeros(self) -> float:
        """Exact zeros among the gradients of the model."""
        return count_zeros_fp32(self.get_parameters(), self.get_grad_stats_parallel_group())

    # --- loss scale -----------------------------------------------------------------------------------------

    def get_loss_scale(self) -> Tensor:
        """Factor of the loss, [1] fp32 on the device; 1 without loss scaling."""
        return torch.ones(1, dtype=torch.float32, device=accelerator.current_device())

    def scale_loss(self, loss: Tensor) -> Tensor:
        """``loss`` times the loss scale, same shape."""
        return loss * self.get_loss_scale()[0]

    # --- state ----------------------------------------------------------------------------------------------

    @abstractmethod
    def reload_model_params(self) -> None:
        """Takes over parameters that somebody wrote into the model (a checkpoint without optimizer state)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint; tensors are the live ones."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            CheckpointError: the state belongs to another model or precision.
        """

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """State as shards for the ``torch_dist`` checkpoint format."""
        raise NotBuiltYetError(
            "optimizer state in torch_dist checkpoints",
            "ckpt_format torch_dist",
            "Use torch.",
        )

    def get_parameter_state_dp_zero(self) -> Any:
        """The state that the distributed optimizer keeps in shards, collected on one rank.

        Raises:
            ConfigError: this is no distributed optimizer.
        """
        raise no_sharded_state()

    def save_parameter_state(self, filename: str) -> None:
        """Writes ``distrib_optim.pt``, the state that the distributed optimizer keeps in shards.

        Raises:
            ConfigError: this is no distributed optimizer.
        """
        raise no_sharded_state()

    def load_parameter_state(self, filename: str, *, update_legacy_format: bool = False) -> None:
        """Reads what :meth:`save_parameter_state` wrote.

        Raises:
            ConfigError: this is no distributed optimizer.
        """
        raise no_sharded_state()


def no_sharded_state() -> ConfigError:
    """What to raise where state in shards is asked of an optimizer that has none."""
    return ConfigError(
        "only the distributed optimizer has sharded state to save or load: add use_distributed_optimizer"
    )


class FP32Optimizer(MegatronOptimizer):
    """No copies, no loss scale."""

    def prepare_grads(self) -> bool:
        return self.unscale_grads()

    def unscale_grads(self) -> bool:
        with timed(self.config, "optimizer-copy-to-main-grad"):
            for param in self.get_parameters():
                param.grad = getattr(param, "main_grad", param.grad)
        return False

    def update_loss_scale(self, found_inf: bool) -> None:
        """There is no loss scale."""

    def step_with_ready_grads(self) -> bool:
        self.require_rates()
        with timed(self.config, "optimizer-inner-step"):
            self.optimizer.step()
        for param in self.get_parameters():
            if hasattr(param, "main_grad"):
                # Or the next backward would add into the main gradient behind the wrapper's back.
                param.grad = None
        return True

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def reload_model_params(self) -> None:
        """The model's parameters are the optimizer's own."""

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_inner_state(self.optimizer, state_dict)
