"""Training in fp16 or bf16: the update is made on fp32 copies of the parameters."""

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.fusions.multi_tensor import unscale_and_check, watch_overflow
from megatron.core.optimizer.base import MegatronOptimizer, _create_nothing
from megatron.core.optimizer.clip_grads import reduce_over
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.torch_optimizers import load_inner_state
from megatron.core.timers import timed
from megatron.core.utils import log_single_rank
from megatron.core.utils.tensors import mark

logger = logging.getLogger(__name__)

_HALF_TYPES = (torch.float16, torch.bfloat16)
# Attributes of a model parameter that its fp32 copy needs for statistics.
_COPIED_ATTRIBUTES = ("tensor_model_parallel", "partition_dim", "partition_stride", "shared")


class MixedPrecisionOptimizer(MegatronOptimizer):
    """Loss scaling and skipped steps; subclasses say where the copies live.

    Args:
        grad_scaler: keeper of the loss scale; None for no scaling and no overflow check (bf16).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
        init_state_fn: Callable[[torch.optim.Optimizer], None] = _create_nothing,
    ):
        super().__init__(optimizer, config, init_state_fn)
        self.grad_scaler = grad_scaler

    def get_loss_scale(self) -> Tensor:
        return super().get_loss_scale() if self.grad_scaler is None else self.grad_scaler.scale

    def reload_model_params(self) -> None:
        self._copy_model_params_to_main_params()

    def prepare_grads(self) -> bool:
        found_inf = self.unscale_grads()
        self.update_loss_scale(found_inf)
        return found_inf

    def unscale_grads(self) -> bool:
        with timed(self.config, "optimizer-copy-to-main-grad"):
            self._copy_model_grads_to_main_grads()
        if self.grad_scaler is None:
            return False
        with timed(self.config, "optimizer-unscale-and-check-inf"):
            return self._unscale_main_grads_and_check_for_nan(self.grad_scaler.inv_scale)

    def update_loss_scale(self, found_inf: bool) -> None:
        if self.grad_scaler is not None:
            self.grad_scaler.update(found_inf)

    def step_with_ready_grads(self) -> bool:
        self.require_rates()
        with timed(self.config, "optimizer-inner-step"):
            self.optimizer.step()
        with timed(self.config, "optimizer-copy-main-to-model-params"):
            self._copy_main_params_to_model_params()
        return True

    def start_overflow_watch(self) -> None:
        """For :meth:`zero_grad`, before the forward passes whose gradients will be checked."""
        if self.grad_scaler is not None:
            watch_overflow(self.grad_scaler.inv_scale)

    def _unscale_main_grads_and_check_for_nan(self, inv_scale: Tensor) -> bool:
        """Multiplies the main gradients by ``inv_scale``; True if any rank of the model met Inf or NaN."""
        grads = [param.grad for param in self.get_parameters() if param.grad is not None]
        found_inf = unscale_and_check(grads, inv_scale)
        reduce_over(found_inf, dist.ReduceOp.MAX, self.get_grad_stats_parallel_group())
        return found_inf.item() > 0

    def _load_scale(self, saved: dict[str, Any] | None) -> None:
        if self.grad_scaler is None or not self.grad_scaler.state_dict():
            return
        if saved:
            self.grad_scaler.load_state_dict(saved)
        else:
            log_single_rank(
                logger,
                logging.WARNING,
                "the checkpoint has no loss scale: starting from %s",
                self.grad_scaler.scale.item(),
            )

    @abstractmethod
    def _copy_model_grads_to_main_grads(self) -> None:
        """Gradients in fp32 as ``grad`` of the parameters that the torch optimizer updates."""

    @abstractmethod
    def _copy_main_params_to_model_params(self) -> None:
        """Rounds the updated copies into the model."""

    @abstractmethod
    def _copy_model_params_to_main_params(self) -> None:
        """Refreshes the copies from the model."""


class Float16OptimizerWithFloat16Params(MixedPrecisionOptimizer):
    """Whole fp32 copies of all fp16/bf16 parameters on every rank; fp32 parameters are updated directly.

    The torch ``optimizer`` comes with the model's parameters in its groups and gets the copies in their
    place. Every model parameter points at its copy by the attribute ``main_param``.

    Raises:
        ConfigError: a parameter that is neither fp16, bf16 nor fp32.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
        init_state_fn: Callable[[torch.optim.Optimizer], None] = _create_nothing,
    ):
        super().__init__(optimizer, config, grad_scaler, init_state_fn)
        # Per group: model parameters in half precision, and their copies in the same order.
        self.float16_groups: list[list[torch.nn.Parameter]] = []
        self.fp32_from_float16_groups: list[list[Tensor]] = []
        self.fp32_from_fp32_groups: list[list[torch.nn.Parameter]] = []
        for group in optimizer.param_groups:
            self._replace_by_copies(group)

    def _replace_by_copies(self, group: dict[str, Any]) -> None:
        """Sorts a group's parameters by type and puts fp32 copies into the group."""
        params: list[torch.nn.Parameter] = group["params"]
        for param in params:
            if param.dtype not in (*_HALF_TYPES, torch.float32):
                raise ConfigError(
                    f"a parameter of type {param.dtype} cannot be trained: use fp32, fp16 or bf16"
                )
        half = [param for param in params if param.dtype in _HALF_TYPES]
        copies = {param: _make_main_param(param) for param in half}
        group["params"] = [copies.get(param, param) for param in params]
        self.float16_groups.append(half)
        self.fp32_from_float16_groups.append([copies[param] for param in half])
        self.fp32_from_fp32_groups.append([param for param in params if param.dtype == torch.float32])

    def _model_params(self) -> list[Tensor]:
        return [param for group in self.float16_groups for param in group]

    def _main_params(self) -> list[Tensor]:
        return [param for group in self.fp32_from_float16_groups for param in group]

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.start_overflow_watch()
        # The copies' gradients are made anew in every step; holding on to them would only cost memory.
        for main_param in self._main_params():
            main_param.grad = None
        for param in [*self._model_params(), *(p for group in self.fp32_from_fp32_groups for p in group)]:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.detach_().zero_()

    def _copy_model_grads_to_main_grads(self) -> None:
        for param, main_param in zip(self._model_params(), self._main_params(), strict=True):
            grad = getattr(param, "main_grad", param.grad)
            # A gradient that is fp32 already is not copied: unscaling and clipping then change the buffer.
            main_param.grad = None if grad is None else grad.float()
            param.grad = None
        for param in (p for group in self.fp32_from_fp32_groups for p in group):
            param.grad = getattr(param, "main_grad", param.grad)

    @torch.no_grad()
    def _copy_main_params_to_model_params(self) -> None:
        if self._model_params():
            torch._foreach_copy_(self._model_params(), self._main_params())

    @torch.no_grad()
    def _copy_model_params_to_main_params(self) -> None:
        if self._model_params():
            torch._foreach_copy_(self._main_params(), self._model_params())

    def state_dict(self, is_loading: bool = False) -> dict[str, Any]:
        """Keys ``optimizer``, ``fp32_from_fp16_params`` (a list per group) and perhaps ``grad_scaler``."""
        if is_loading:
            self.init_state_fn(self.optimizer)
        state: dict[str, Any] = {"optimizer": self.optimizer.state_dict()}
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        # Detached, so that the attributes of the copies are not pickled with them.
        state["fp32_from_fp16_params"] = [
            [main.detach() for main in group] for group in self.fp32_from_float16_groups
        ]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        inner = state_dict.get("optimizer", state_dict.get("optimizer_state_dict"))
        copies = state_dict.get("fp32_from_fp16_params", state_dict.get("fp32_from_fp16"))
        if inner is None or copies is None:
            raise CheckpointError(
                f"optimizer state with the entries {sorted(map(str, state_dict))} was not saved by an fp16 "
                "or bf16 run without the distributed optimizer, as this one is: resume with the saved "
                "precision, or leave this state unread (no_load_optim)"
            )
        found = [[list(copy.shape) for copy in group] for group in copies]
        own = [[list(copy.shape) for copy in group] for group in self.fp32_from_float16_groups]
        if found != own:
            raise CheckpointError(
                "the fp32 parameters in the checkpoint have other shapes than this model's: resume with "
                "the model settings of the saved run, or leave this state unread (no_load_optim)"
            )
        load_inner_state(self.optimizer, inner)
        with torch.no_grad():
            for group, saved_group in zip(self.fp32_from_float16_groups, copies, strict=True):
                for main_param, saved in zip(group, saved_group, strict=True):
                    main_param.copy_(saved)
        self._load_scale(state_dict.get("grad_scaler"))


def _make_main_param(param: torch.nn.Parameter) -> Tensor:
    """The fp32 copy of ``param``, with the attributes that statistics look at."""
    main_param = param.detach().clone().float()
    copy_attributes(main_param, param)
    mark(param, main_param=main_param)
    return main_param


def copy_attributes(main_param: Tensor, param: torch.nn.Parameter) -> None:
    """Gives a main parameter what statistics ask of the model's."""
    for name in _COPIED_ATTRIBUTES:
        if hasattr(param, name):
            setattr(main_param, name, getattr(param, name))
