"""Rotation of channel pairs."""

import torch
from torch import Tensor

from tests.npu.kernels.registration import kernel


def rotated(x: Tensor, mode: str) -> Tensor:
    """Halves [a | b] -> [-b | a]; interleaved pairs (x0, x1) -> (-x1, x0)."""
    if mode == "half":
        middle = x.shape[-1] // 2
        return torch.cat((-x[..., middle:], x[..., :middle]), -1)
    assert mode == "interleave"
    out = torch.empty_like(x)
    out[..., 0::2], out[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return out


@kernel("npu_rotary_mul")
def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    assert rotate is None and input.dim() == 4 and input.shape[-1] % 2 == 0 and input.shape[-1] < 896
    assert r1.shape == r2.shape and r1.shape[-1] == input.shape[-1]
    # Tables of another type are rounded to that of the input first.
    x, cos, sin = input.float(), r1.to(input.dtype).float(), r2.to(input.dtype).float()
    return (x * cos + rotated(x, rotary_mode) * sin).to(input.dtype)
