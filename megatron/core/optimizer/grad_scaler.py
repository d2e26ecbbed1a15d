"""Loss scales: the factor that keeps small fp16 gradients from vanishing."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from megatron.core import accelerator
from megatron.core.errors import ConfigError


class MegatronGradScaler(ABC):
    """Holds the scale as a one-element fp32 tensor on the device.

    Raises:
        ConfigError: a scale that is not positive.
    """

    def __init__(self, initial_scale: float):
        if not initial_scale > 0.0:
            raise ConfigError(f"loss scale {initial_scale} must be positive, for example 65536")
        self._scale = torch.tensor([initial_scale], dtype=torch.float32, device=accelerator.current_device())

    @property
    def scale(self) -> Tensor:
        """Factor of the loss, [1] fp32."""
        return self._scale

    @property
    def inv_scale(self) -> Tensor:
        """Factor that undoes it, [1] fp32."""
        return self._scale.reciprocal()

    @abstractmethod
    def update(self, found_inf: bool) -> None:
        """Takes note of a step: ``found_inf`` says that its gradients overflowed."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to keep."""

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken."""


class ConstantGradScaler(MegatronGradScaler):
    """A scale that never changes. Overflowing steps are still skipped."""

    def update(self, found_inf: bool) -> None:
        """A constant takes no notice."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The command line's constant stays."""


class DynamicGradScaler(MegatronGradScaler):
    """A scale that backs off on overflow and grows after ``growth_interval`` clean steps in a row.

    Every overflow costs one of ``hysteresis`` credits; once none is left, each further overflow multiplies
    the scale by ``backoff_factor`` (not below ``min_scale``). Only growth by a full window refills the
    credits.

    Raises:
        ConfigError: bounds or factors under which the scale could not move as described.
    """

    def __init__(
        self,
        initial_scale: float,
        min_scale: float,
        growth_factor: float,
        backoff_factor: float,
        growth_interval: float,
        hysteresis: int,
    ):
        super().__init__(initial_scale)
        broken = [
            (not 0.0 < min_scale <= initial_scale, f"min_scale {min_scale} must be in (0, {initial_scale}]"),
            (not growth_factor > 1.0, f"growth_factor {growth_factor} must be above 1"),
            (not 0.0 < backoff_factor < 1.0, f"backoff_factor {backoff_factor} must be between 0 and 1"),
            (growth_interval < 1, f"growth_interval {growth_interval} must be 1 step or more"),
            (hysteresis < 1, f"hysteresis {hysteresis} must be 1 overflow or more"),
        ]
        problems = [message for is_broken, message in broken if is_broken]
        if problems:
            raise ConfigError("dynamic loss scale: " + "; ".join(problems))
        self.min_scale = min_scale
        self.growth_factor = growth_factor
        self.backoff_factor = backoff_factor
        self.growth_interval = int(growth_interval)  # whole steps; what users write may be 1e3
        self.hysteresis = hysteresis
        self._growth_tracker = 0
        self._hysteresis_tracker = hysteresis

    def update(self, found_inf: bool) -> None:
        if found_inf:
            self._growth_tracker = 0
            self._hysteresis_tracker -= 1
            if self._hysteresis_tracker <= 0:
                self._scale = torch.clamp(self._scale * self.backoff_factor, min=self.min_scale)
            return
        self._growth_tracker += 1
        if self._growth_tracker == self.growth_interval:
            self._growth_tracker = 0
            self._hysteresis_tracker = self.hysteresis
            self._scale = self._scale * self.growth_factor

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self._scale,
            "growth_tracker": self._growth_tracker,
            "hysteresis_tracker": self._hysteresis_tracker,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scale = state_dict["scale"].to(accelerator.current_device(), torch.float32).reshape(1)
        self._growth_tracker = int(state_dict["growth_tracker"])
        self._hysteresis_tracker = int(state_dict["hysteresis_tracker"])
