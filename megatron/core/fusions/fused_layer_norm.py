"""Layer normalisation and root-mean-square normalisation: functions, and modules for layer specs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.core import accelerator
from megatron.core.accelerator import row_blocks
from megatron.core.errors import ConfigError
from megatron.core.overrides import overridable
from megatron.core.utils.tensors import mark


@overridable
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension to mean 0 and variance 1, then scales and shifts.

    x: [..., h], weight and bias: [h] -> [..., h] in the dtype of ``weight`` (an fp32 residual stream enters
    a bf16 layer here). Sums are fp32.
    """
    if x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps).to(weight.dtype)


@overridable
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    x: [..., h], weight: [h] -> [..., h] in the dtype of ``weight``. The mean is fp32.
    """
    if x.dtype == weight.dtype:
        return _RmsNorm.apply(x, weight, eps)
    return _RmsNorm.apply(x, weight.to(x.dtype), eps).to(weight.dtype)


class _RmsNorm(torch.autograd.Function):
    """Keeps its operands only.  Backward works in fp32, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        width = weight.shape[0]
        x_2d, grad_2d = x.reshape(-1, width), grad.reshape(-1, width)
        norm = torch.linalg.vector_norm(x_2d, dim=-1, keepdim=True, dtype=_wide(x.dtype))
        scale = torch.rsqrt(norm.square() / width + ctx.eps)
        grad_x = torch.empty_like(x_2d)
        grad_weight = torch.zeros(width, dtype=scale.dtype, device=x.device)
        for block in row_blocks(x_2d.shape[0], width, x.device):
            normed = x_2d[block] * scale[block]
            product = grad_2d[block] * normed
            grad_weight += product.sum(dim=0)
            # d/dx = scale * (g w - normed * mean(g w normed))
            mean = torch.mv(product, weight.to(product.dtype)).div_(width).unsqueeze(1)
            inner = (grad_2d[block] * weight.to(product.dtype)).addcmul_(normed, mean, value=-1.0)
            torch.mul(inner, scale[block], out=grad_x[block])
        return grad_x.view(x.shape), grad_weight.to(weight.dtype), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
        mark(parameter, sequence_parallel=self.sequence_parallel)
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
