"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) with its arithmetic behind one replaceable function."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core.optimizer.torch_optimizers import Untraced
from megatron.core.overrides import overridable


@overridable
def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One update, in place, of tensors that have all been updated equally often.

        p = p (1 - lr weight_decay) - lr m' / (sqrt(v') + eps)
        m' = m / (1 - beta1^step),  v' = v / (1 - beta2^step)

    with m, v the running means of the gradient and its square.

    Args:
        params: tensors to update; the other lists match them in order, shape and (normally) type.
        grads: gradients, left as they are.
        exp_avgs: m, updated.
        exp_avg_sqs: v, updated.
        step: number of this update, from 1.
    """
    update = _fused_update if _has_fused_kernel(params[0].device) else _foreach_update
    update(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
    )


def _fused_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """torch's single-pass kernel. It only reads the step counts, so one tensor serves all parameters."""
    count = torch.full((), float(step), dtype=torch.float32, device=params[0].device)
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [count] * len(params),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _foreach_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """The formula, one operation over all tensors at a time, for a device without the fused kernel."""
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr / (1 - beta1**step))


@functools.cache
def _has_fused_kernel(device: torch.device) -> bool:
    """Whether torch has its fused AdamW for this device, found out by a step of one element."""
    tensors = [[torch.zeros(1, device=device)] for _ in range(4)]
    try:
        _fused_update(*tensors, step=1, lr=0.0, beta1=0.9, beta2=0.9, eps=1.0, weight_decay=0.0)
    except (NotImplementedError, RuntimeError):
        return False
    return True


class Adam(Untraced, torch.optim.AdamW):
    """``torch.optim.AdamW`` to its users and in checkpoints; the update itself is :func:`adamw_step`."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what ``closure`` returned."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            grads = {param: param.grad for param in group["params"] if param.grad is not None}
            beta1, beta2 = group["betas"]
            for step, members in self._count_step(list(grads)).items():
                states = [self.state[param] for param in members]
                adamw_step(
                    members,
                    [grads[param] for param in members],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    step=step,
                    lr=float(group["lr"]),
                    beta1=beta1,
                    beta2=beta2,
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
        return result

    def _count_step(self, params: list[Tensor]) -> dict[int, list[Tensor]]:
        """Adds one to the parameters' step counts and sorts them by the result, normally a single value.

        The counts stay on the host: kernels take them as numbers, and reading must not wait for the device.
        """
        if not params:
            return {}
        for param in params:
            create_adam_state(self.state[param], param)
        counts = [self.state[param]["step"] for param in params]
        torch._foreach_add_(counts, 1)
        by_step: dict[int, list[Tensor]] = {}
        for param, count in zip(params, counts, strict=True):
            by_step.setdefault(int(count.item()), []).append(param)
        return by_step


def create_adam_state(state: dict[str, Tensor], param: Tensor) -> None:
    """Fills an empty per-parameter ``state``: step count 0 on the host, zero moments beside the parameter."""
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(param)
        state["exp_avg_sq"] = torch.zeros_like(param)
