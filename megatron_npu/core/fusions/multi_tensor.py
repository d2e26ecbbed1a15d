"""Overflow of fp16 gradients on chips that saturate.

Such a chip writes 65504 where IEEE arithmetic has Inf, and 0 for NaN: no gradient ever looks wrong. A flag of
the device tells that some operator since the last clearing overflowed.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_npu import chip
from megatron_npu.registry import FLOATS, replaces

_OPERATORS = ("npu_get_float_status", "npu_clear_float_status")


def _why_not_needed() -> str | None:
    return (
        None if chip.saturates() else "INF/NAN mode: overflow shows in the gradients, torch's check finds it"
    )


@replaces(
    "megatron.core.fusions.multi_tensor.watch_overflow",
    operators=_OPERATORS,
    since="5.0.rc3",
    only_if=_why_not_needed,
    bound=dict.fromkeys(FLOATS, 0.0),
)
def watch_overflow(inv_scale: Tensor) -> None:
    """Clears the flag, which evaluation or an optimizer step may have set."""
    torch.ops.npu.npu_clear_float_status(_new_status(inv_scale))


@replaces(
    "megatron.core.fusions.multi_tensor.unscale_and_check",
    operators=_OPERATORS,
    since="5.0.rc3",
    only_if=_why_not_needed,
    bound={torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2},
)
def unscale_and_check(grads: list[Tensor], inv_scale: Tensor) -> Tensor:
    """Reads the flag; gradients are worth unscaling only while it is down.

    The rank that overflowed may be any: after data-parallel summation its gradients look like the others'.
    So every rank of the run is asked, not only those that hold the other parts of the model.
    """
    given = _new_status(inv_scale)
    status = torch.ops.npu.npu_get_float_status(given)
    # Early releases wrote into the operand, later ones into the result.
    found_inf = ((status[:1] != 0) | (given[:1] != 0)).to(inv_scale.dtype).view_as(inv_scale)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
    if grads:
        torch._foreach_mul_(grads, inv_scale.to(grads[0].dtype).reshape(()))
    return found_inf


def _new_status(like: Tensor) -> Tensor:
    return torch.zeros(8, dtype=torch.float32, device=like.device)
