"""Dropout, and the end of a sub-layer: add its bias, drop out, add the residual."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import accelerator
from megatron.core.overrides import overridable

# Random lanes are 16 bits wide, so a probability is rounded to a multiple of 2^-16 (and the scale with it).
_LANES = 1 << 16
_LOWEST_LANE = -(_LANES >> 1)


@overridable
def dropout(x: Tensor, p: float) -> Tensor:
    """Zeroes each element of ``x`` with probability ``p`` and divides the others by ``1 - p``.

    Draws from the current stream of the device's default generator.
    """
    if accelerator.draws_in_parallel(x.device) or not drops_by_lanes(p):
        return F.dropout(x, p)
    # One number from torch's generator: saving and restoring its state replays the mask.
    return _LaneDropout.apply(x, p, int(torch.randint(1 << 62, ())))


def drops_by_lanes(p: float) -> bool:
    """True if ``p`` is neither 0 nor 1 after rounding to a lane."""
    return 0 < round(p * _LANES) < _LANES


def keep_mask(shape: torch.Size, p: float, seed: int) -> tuple[Tensor, float]:
    """CPU bool mask of ``shape``, False with probability ``p``, and the factor for what is kept.

    Four lanes cost a nanosecond; torch's own Bernoulli sampler takes 6 ns an element.
    """
    numel, dropped_lanes = shape.numel(), round(p * _LANES)
    words = np.random.SFC64(seed).random_raw(-(-numel // 4))
    lanes = torch.from_numpy(words.view(np.int16))[:numel]
    return (lanes >= _LOWEST_LANE + dropped_lanes).view(shape), _LANES / (_LANES - dropped_lanes)


class _LaneDropout(torch.autograd.Function):
    """Dropout with a mask made of 16-bit random lanes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        mask, ctx.scale = keep_mask(x.shape, p, seed)
        ctx.save_for_backward(mask)
        return torch.ops.aten.native_dropout_backward(x, mask, ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grad, mask, ctx.scale), None, None


BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


@overridable
def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, training: bool) -> Tensor:
    """``residual + dropout(x + bias)``.  x, residual: [s, b, h], bias: [h] or None -> [s, b, h].

    The result has the wider dtype of ``x`` and ``residual``.
    """
    out = x if bias is None else x + bias
    if training and p > 0.0:
        out = dropout(out, p)
    return residual + out


def bias_dropout_add_unfused(training: bool) -> BiasDropoutAdd:
    """A function ``(x_with_bias, residual, probability)``, training or not."""
    return bias_dropout_add_fused_train if training else bias_dropout_add_fused_inference


def bias_dropout_add_fused_train(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
) -> Tensor:
    """``residual + dropout(x + bias)``."""
    return bias_dropout_add(*x_with_bias, residual, prob, True)


def bias_dropout_add_fused_inference(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
) -> Tensor:
    """``residual + x + bias``."""
    return bias_dropout_add(*x_with_bias, residual, prob, False)


def get_bias_dropout_add(training: bool, fused: bool) -> BiasDropoutAdd:
    """What a layer's ``bda`` slot holds; ``fused`` changes nothing here, for one function serves both."""
    return bias_dropout_add_unfused(training)
