"""RMSNorm: fp32 inside, one rounding after the product with gamma."""

import torch
from torch import Tensor

from tests.npu.kernels.registration import kernel

_HALF = (torch.float16, torch.bfloat16)


@kernel("npu_rms_norm")
def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    assert input.dtype == gamma.dtype or (input.dtype in _HALF and gamma.dtype == torch.float32)
    assert 2 <= input.dim() <= 8
    x = input.float()
    rstd = 1 / ((x * x).mean(-1, keepdim=True) + epsilon).sqrt()
    return (x * rstd * gamma.float()).to(input.dtype), rstd


@kernel("npu_rms_norm_backward")
def rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    x, grad, width = input.float(), dy.float(), gamma.numel()
    unit = x * rstd
    inner = grad * gamma.float()
    dx = rstd * (inner - unit * (inner * unit).sum(-1, keepdim=True) / width)
    dgamma = (grad * unit).reshape(-1, width).sum(0)
    return dx.to(input.dtype), dgamma.to(gamma.dtype)
