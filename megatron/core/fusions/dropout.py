"""Dropout that is fast where random numbers are drawn one after the other."""

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
