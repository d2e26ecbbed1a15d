"""Derivatives of torch's operations for which torch_npu has operators of its own."""

import torch
from torch import Tensor
from torch import library as torch_library

from megatron_npu.virtual.kernels import kernel


def install(library: torch_library.Library) -> None:
    """Registers what belongs to torch's namespace; the rest of this module is among ``KERNELS``."""
    library.impl("matmul_backward", _matmul_backward, "PrivateUse1")
    # torch_npu's own, at this key, goes past the dispatcher, and refuses a 950 without CANN.
    library.impl("softmax.int", _softmax, "AutogradPrivateUse1", allow_override=True)


def _softmax(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch._softmax(self if dtype is None else self.to(dtype), dim, False)


def _matmul_backward(
    grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    a = self.unsqueeze(0) if self.dim() == 1 else self
    b = other.unsqueeze(1) if other.dim() == 1 else other
    if self.dim() == 1:
        grad = grad.unsqueeze(-1 if other.dim() == 1 else -2)
    if other.dim() == 1:
        grad = grad.unsqueeze(-1)
    if b.dim() == 2 and a.dim() > 2:  # one product over all rows, not one per batch and a sum of them
        a, grad = a.flatten(0, -2), grad.flatten(0, -2)
    grad_a = (grad @ b.mT).sum_to_size(a.shape).view(self.shape) if mask[0] else None
    grad_b = (a.mT @ grad).sum_to_size(b.shape).view(other.shape) if mask[1] else None
    return grad_a, grad_b


@kernel("repeat_interleave_backward_int")
def repeat_interleave_backward_int(
    grad: Tensor, input: Tensor, repeats: int, dim: int | None = None
) -> Tensor:
    if dim is None:
        return grad.view(-1, repeats).sum(1).view(input.shape)
    dim %= input.dim()
    return grad.unflatten(dim, (input.shape[dim], repeats)).sum(dim + 1)


@kernel("repeat_interleave_backward_tensor")
def repeat_interleave_backward_tensor(
    grad: Tensor, input: Tensor, repeats: Tensor, dim: int | None = None
) -> Tensor:
    if dim is None:
        return repeat_interleave_backward_tensor(grad, input.flatten(), repeats, 0).view(input.shape)
    source = torch.arange(input.shape[dim]).repeat_interleave(repeats)
    return torch.zeros_like(input).index_add(dim, source, grad)


@kernel("npu_gather_backward")
def gather_backward(grad: Tensor, self_size: list[int], dim: int, index: Tensor, sparse_grad: bool) -> Tensor:
    return grad.new_zeros(self_size).scatter_add(dim, index, grad)
