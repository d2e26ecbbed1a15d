"""Scaled masked softmax: hidden scores are -10000."""

import torch
from torch import Tensor

from tests.npu.kernels.registration import kernel


@kernel("npu_scaled_masked_softmax")
def scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False) -> Tensor:
    assert x.dim() == 4 and mask.dtype == torch.bool and not fixed_triu_mask
    assert all(side % 32 == 0 and 32 <= side <= 4096 for side in x.shape[-2:])
    scores = torch.where(mask, torch.tensor(-10000.0), x.float() * scale)
    weights = (scores - scores.max(-1, keepdim=True).values).exp()
    return (weights / weights.sum(-1, keepdim=True)).to(x.dtype)


@kernel("npu_scaled_masked_softmax_backward")
def scaled_masked_softmax_backward(
    y_grad: Tensor, y: Tensor, mask: Tensor, scale: float, fixed_triu_mask: bool
) -> Tensor:
    grad, p = y_grad.float(), y.float()
    return (scale * p * (grad - (grad * p).sum(-1, keepdim=True))).to(y.dtype)
