"""AdamW in place, and the overflow flag of a device that saturates."""

import torch
from torch import Tensor

from megatron_npu.virtual.kernels import kernel


@kernel("npu_apply_adam_w.out")
def apply_adam_w(
    beta1_power: float,
    beta2_power: float,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    grad: Tensor,
    max_grad_norm: Tensor | None,
    amsgrad: bool | None,
    maximize: bool | None,
    *,
    out: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The powers are of the step before. Every scalar is rounded to the type of the parameter."""
    var, m, v = out
    assert grad.dtype == var.dtype == m.dtype == v.dtype and grad.shape == var.shape and not amsgrad
    power1, power2, rate, decay, b1, b2, eps = (
        torch.tensor(number, dtype=var.dtype)
        for number in (beta1_power, beta2_power, lr, weight_decay, beta1, beta2, epsilon)
    )
    g = -grad if maximize else grad
    new_m = b1 * m + (1 - b1) * g
    new_v = b2 * v + (1 - b2) * g * g
    step = (new_m / (1 - power1 * b1)) / ((new_v / (1 - power2 * b2)).sqrt() + eps)
    var.copy_(var - rate * decay * var - rate * step)
    m.copy_(new_m)
    v.copy_(new_v)
    return var, m, v


class OverflowFlag:
    """Sticky: any operator may raise it, only clearing lowers it."""

    raised = False


@kernel("npu_get_float_status")
def get_float_status(input: Tensor, mode: int = 0) -> Tensor:
    assert input.shape == (8,) and input.dtype == torch.float32
    return torch.full((8,), float(OverflowFlag.raised))


@kernel("npu_clear_float_status")
def clear_float_status(input: Tensor, mode: int = 0) -> Tensor:
    assert input.shape == (8,)
    OverflowFlag.raised = False
    return torch.zeros(8)
