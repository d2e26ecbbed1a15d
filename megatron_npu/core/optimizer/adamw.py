"""AdamW."""

import torch
from torch import Tensor

from megatron_npu.registry import replaces


def _unsuitable(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], **_: float
) -> str | None:
    dtype = params[0].dtype
    lists = (params, grads, exp_avgs, exp_avg_sqs)
    mixed = any(t.dtype != dtype for tensors in lists for t in tensors)
    return "operands of different types" if mixed else None


@replaces(
    "megatron.core.optimizer.adamw.adamw_step",
    operators=("npu_apply_adam_w",),
    since="5.0.rc3",
    dtypes=(torch.float32,),
    unless=_unsuitable,
    limits="parameters that are not fp32, operands of different types",
    bound={torch.float32: 2e-6},
)
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
    """The operator multiplies the powers that it is given by beta once more, so they are those of the step
    before; all its scalars stay on the host.
    """
    powers = (beta1 ** (step - 1), beta2 ** (step - 1))
    update = torch.ops.npu.npu_apply_adam_w.out
    for param, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        update(
            *powers, lr, weight_decay, beta1, beta2, eps, grad, None, False, False,
            out=[param, exp_avg, exp_avg_sq],
        )  # fmt: skip
