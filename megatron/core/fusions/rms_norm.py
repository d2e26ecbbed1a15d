"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions.blocks import row_blocks
from megatron.core.overrides import overridable


@overridable
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    x: [..., h], weight: [h] -> [..., h] in the dtype of ``weight``. The mean is fp32.
    """
    if x.dtype == weight.dtype:
        return _RmsNorm.apply(x, weight, eps)
    return _RmsNorm.apply(x, weight.to(x.dtype), eps).to(weight.dtype)


class _RmsNorm(torch.autograd.Function):
    """Keeps its operands only.  Backward works in fp32, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        width = weight.shape[0]
        x_2d, grad_2d = x.reshape(-1, width), grad.reshape(-1, width)
        norm = torch.linalg.vector_norm(x_2d, dim=-1, keepdim=True, dtype=_wide(x.dtype))
        scale = torch.rsqrt(norm.square() / width + ctx.eps)
        grad_x = torch.empty_like(x_2d)
        grad_weight = torch.zeros(width, dtype=scale.dtype, device=x.device)
        for block in row_blocks(*x_2d.shape, x.device):
            normed = x_2d[block] * scale[block]
            product = grad_2d[block] * normed
            grad_weight += product.sum(dim=0)
            # d/dx = scale * (g w - normed * mean(g w normed))
            mean = torch.mv(product, weight.to(product.dtype)).div_(width).unsqueeze(1)
            inner = (grad_2d[block] * weight.to(product.dtype)).addcmul_(normed, mean, value=-1.0)
            torch.mul(inner, scale[block], out=grad_x[block])
        return grad_x.view(x.shape), grad_weight.to(weight.dtype), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
