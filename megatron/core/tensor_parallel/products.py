"""Products of linear layers, in what this device multiplies fast."""

import torch.nn.functional as F
from torch import Tensor

from megatron.core import accelerator


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``.  [..., in], [out, in], [out] -> [..., out], in the dtype of ``x``"""
    compute = accelerator.matmul_compute_dtype(x.dtype, x.device)
    if compute == x.dtype:
        return F.linear(x, weight, bias)
    wide_bias = None if bias is None else bias.to(compute)
    return F.linear(x.to(compute), weight.to(compute), wide_bias).to(x.dtype)


def input_gradient(grad_output: Tensor, weight: Tensor) -> Tensor:
    """``grad_output weight``.  [..., out], [out, in] -> [..., in]"""
    compute = accelerator.matmul_compute_dtype(grad_output.dtype, grad_output.device)
    return grad_output.to(compute).matmul(weight.to(compute)).to(grad_output.dtype)


def as_rows(t: Tensor) -> Tensor:
    """[s, b, h] -> [s*b, h]"""
    return t.reshape(-1, t.shape[-1])
