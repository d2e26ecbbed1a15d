"""Passes over many gradients at once: the points where a device may put a fused kernel of its own."""

import torch
from torch import Tensor

from megatron.core import accelerator
from megatron.core.overrides import overridable

# torch's CPU norm adds up in fp32 along each vector lane: over 20 million values it is off by 1e-3, over
# pieces of this size by 2e-7, for 0.03 ns per value more. Device reductions work as trees and need no pieces.
_CPU_NORM_PIECE = 1 << 16


@overridable
def watch_overflow(inv_scale: Tensor) -> None:
    """Marks the beginning of the work whose overflow :func:`unscale_and_check` is to find.

    Where overflow makes Inf and NaN, which stay in the gradients, there is nothing to remember. Where it
    makes the largest finite number, a device keeps a flag that is to be lowered here.

    Args:
        inv_scale: [1] fp32 on the device that will compute.
    """


@overridable
def unscale_and_check(grads: list[Tensor], inv_scale: Tensor) -> Tensor:
    """Multiplies ``grads`` in place by ``inv_scale`` ([1] fp32) and looks for Inf and NaN in the same pass.

    Returns:
        [1] fp32 on the device of ``inv_scale``: 1 if any value was not finite, else 0.
    """
    found_inf = torch.zeros_like(inv_scale)
    if grads:
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, inv_scale)
    return found_inf


@overridable
def l2_norm(tensors: list[Tensor]) -> Tensor:
    """Euclidean norm over all values of all ``tensors`` (one or more): 0-dim fp32."""
    if not accelerator.is_accelerated():
        tensors = [piece for t in tensors for piece in t.reshape(-1).split(_CPU_NORM_PIECE)]
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
    return torch.linalg.vector_norm(norms)


@overridable
def scale_gradients(grads: list[Tensor], factor: float) -> None:
    """Multiplies ``grads`` in place by ``factor``."""
    if grads:
        torch._foreach_mul_(grads, factor)


@overridable
def count_zeros(tensors: list[Tensor]) -> Tensor:
    """Number of exact zeros in all ``tensors`` (one or more): 0-dim int64."""
    nonzero = torch.stack([torch.count_nonzero(t) for t in tensors]).sum()
    return sum(t.numel() for t in tensors) - nonzero
