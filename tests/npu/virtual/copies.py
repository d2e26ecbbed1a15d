"""What the CPU has no kernel for, or not for two devices: copies, and the derivative of a product."""

import torch
from torch import Tensor

from tests.npu.virtual.host_memory import NPU, host


def install(library: torch.library.Library) -> None:
    """Registers the kernels of this module."""
    for name, function in {
        "copy_": _copy,
        "_copy_from_and_resize": _copy_from_and_resize,
        "clone": _clone,
        "contiguous": _contiguous,
        "matmul_backward": _matmul_backward,
    }.items():
        library.impl(name, function, "PrivateUse1")


def _host(t: Tensor) -> Tensor:
    return host(t) if t.device.type == NPU else t


def _copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    _host(self).copy_(_host(source))
    return self


def _copy_from_and_resize(source: Tensor, target: Tensor) -> Tensor:
    return _copy(target.resize_(source.shape), source)


def _clone(self: Tensor, memory_format: torch.memory_format | None = None) -> Tensor:
    # torch_npu's empty_like warns about a memory format of its own.
    like = torch.empty_strided(self.size(), self.stride(), device="meta")
    strides = torch.empty_like(like, memory_format=memory_format or torch.preserve_format).stride()
    return _copy(torch.empty_strided(self.size(), strides, dtype=self.dtype, device=self.device), self)


def _contiguous(self: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return self if self.is_contiguous(memory_format=memory_format) else _clone(self, memory_format)


def _matmul_backward(
    grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """torch_npu differentiates matmul through an operator of which the CPU has no kernel."""
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
