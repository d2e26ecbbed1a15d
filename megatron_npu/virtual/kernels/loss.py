"""Cross entropy over whole rows."""

import torch
from torch import Tensor

from megatron_npu.virtual.kernels import kernel


@kernel("npu_cross_entropy_loss")
def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert weight is None and reduction == "none" and label_smoothing == 0.0 and not return_zloss
    assert input.dim() == 2 and target.dtype == torch.int64 and input.shape[0] <= 200_000
    valid = target != ignore_index
    assert bool(((target[valid] >= 0) & (target[valid] < input.shape[1])).all()), "a target beyond the logits"
    x = input.float()
    largest = x.max(-1, keepdim=True).values
    log_sum = largest + (x - largest).exp().sum(-1, keepdim=True).log()
    log_prob = x - log_sum
    picked = log_prob[torch.arange(len(target)), target.clamp(min=0)]
    loss = torch.where(valid, -picked, torch.zeros(()))
    return loss.to(input.dtype), log_prob.to(input.dtype), input.new_empty(0), input.new_empty(0)


@kernel("npu_cross_entropy_loss_backward")
def cross_entropy_loss_backward(
    grad_loss: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_zloss: Tensor | None = None,
    lse_for_zloss: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
) -> Tensor:
    valid = target != ignore_index
    grad = log_prob.float().exp()
    grad[torch.arange(len(target)), target.clamp(min=0)] -= 1.0
    return (grad * (grad_loss.float() * valid).unsqueeze(1)).to(log_prob.dtype)
