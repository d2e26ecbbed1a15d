"""Copies, between devices too."""

import torch
from torch import Tensor

from tests.npu.virtual.host_memory import NPU, host
from tests.npu.virtual.saturation import saturated


def install(library: torch.library.Library) -> None:
    """Registers the kernels of this module."""
    for name, function in {
        "copy_": _copy,
        "_copy_from_and_resize": _copy_from_and_resize,
        "clone": _clone,
        "contiguous": _contiguous,
    }.items():
        library.impl(name, function, "PrivateUse1")


def _host(t: Tensor) -> Tensor:
    return host(t) if t.device.type == NPU else t


def _copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    saturated(_host(self).copy_, _host(source))
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
