"""Norm modules with parameters, for the slots of layer specs."""

from typing import Any

import torch
from torch import Tensor, nn

from megatron.core import accelerator
from megatron.core.errors import ConfigError
from megatron.core.fusions.layer_norm import layer_norm
from megatron.core.fusions.rms_norm import rms_norm


class _Norm(nn.Module):
    """What both norms share: a scale, possibly stored as its distance from 1.

    Args:
        config: gives ``layernorm_zero_centered_gamma``, ``sequence_parallel``, ``params_dtype`` and where to
        build.
        hidden_size: width of the normalised dimension.
        eps: added to the variance.
        persist_layer_norm: accepted for callers' sake; a choice between two kernels upstream.
        zero_centered_gamma: store ``weight - 1``; also on when the config says so.
        normalization: checked against the class.
    """

    normalization = ""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = True,
        zero_centered_gamma: bool = False,
        normalization: str | None = None,
    ):
        super().__init__()
        if normalization not in (None, self.normalization):
            raise ConfigError(f"{type(self).__name__} is a {self.normalization}, not a {normalization}")
        self.config = config
        self.hidden_size = hidden_size
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma or zero_centered_gamma
        self.sequence_parallel = config.sequence_parallel
        self.weight = self._new_parameter()

    def _new_parameter(self) -> nn.Parameter:
        device = accelerator.build_device(self.config)
        parameter = nn.Parameter(torch.empty(self.hidden_size, dtype=self.config.params_dtype, device=device))
        # Its gradient must be summed over the tensor-parallel ranks when each saw a part of the sequence.
        parameter.sequence_parallel = self.sequence_parallel
        return parameter

    def reset_parameters(self) -> None:
        """Makes the norm's scale 1 and its shift 0."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)

    def scale(self) -> Tensor:
        """The factor, whichever way it is stored.  [h]"""
        return self.weight + 1 if self.zero_centered_gamma else self.weight


class FusedLayerNorm(_Norm):
    """LayerNorm with scale and shift, by the replaceable function."""

    normalization = "LayerNorm"

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = True,
        zero_centered_gamma: bool = False,
        normalization: str | None = "LayerNorm",
    ):
        super().__init__(config, hidden_size, eps, persist_layer_norm, zero_centered_gamma, normalization)
        self.bias = self._new_parameter()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """[..., h] -> [..., h], in the dtype of the weight."""
        return layer_norm(input, self.scale(), self.bias, self.eps)


class FusedRMSNorm(_Norm):
    """RMSNorm with scale, by the replaceable function."""

    normalization = "RMSNorm"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        """[..., h] -> [..., h], in the dtype of the weight."""
        return rms_norm(input, self.scale(), self.eps)


NORMS: dict[str, type[_Norm]] = {norm.normalization: norm for norm in (FusedLayerNorm, FusedRMSNorm)}
