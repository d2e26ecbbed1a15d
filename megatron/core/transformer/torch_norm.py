"""Norms chosen by the config, and a norm without parameters."""

from typing import Any

import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.fusions.fused_layer_norm import NORMS


class WrappedTorchNorm:
    """Factory: constructing it gives the LayerNorm or RMSNorm that ``config.normalization`` asks for."""

    def __new__(
        cls,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> Any:
        wanted = config.normalization
        if wanted not in NORMS:
            raise ConfigError(f"normalization: {wanted!r} is not one of {', '.join(NORMS)}")
        return NORMS[wanted](config, hidden_size, eps, persist_layer_norm, zero_centered_gamma)


class L2Norm(torch.nn.Module):
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in fp32, without parameters."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, **kwargs: Any):
        super().__init__()
        self.hidden_size = hidden_size
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
