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
    dropped_lanes = round(p * _LANES)
    if accelerator.draws_in_parallel(x.device) or not 0 < dropped_lanes < _LANES:
        return F.dropout(x, p)
    return _LaneDropout.apply(x, dropped_lanes)


def keep_mask(shape: torch.Size, dropped_lanes: int) -> Tensor:
    """CPU bool mask of ``shape``, False with probability ``dropped_lanes / 2^16``.

    One number from torch's generator, so that saving and restoring its state replays the mask, seeds a
    generator that yields four lanes per nanosecond; torch's own Bernoulli sampler takes 6 ns an element.
    """
    seed = int(torch.randint(1 << 62, ()))
    numel = shape.numel()
    words = np.random.SFC64(seed).random_raw(-(-numel // 4))
    lanes = torch.from_numpy(words.view(np.int16))[:numel]
    return (lanes >= _LOWEST_LANE + dropped_lanes).view(shape)


class _LaneDropout(torch.autograd.Function):
    """Dropout with a mask made of 16-bit random lanes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped_lanes: int) -> Tensor:
        mask = keep_mask(x.shape, dropped_lanes)
        ctx.scale = _LANES / (_LANES - dropped_lanes)
        ctx.save_for_backward(mask)
        return torch.ops.aten.native_dropout_backward(x, mask, ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.ops.aten.native_dropout_backward(grad, mask, ctx.scale), None
