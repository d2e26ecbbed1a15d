"""Tensors of a virtual NPU lie in host memory: the same bytes as a CPU tensor, and back; copies of them."""

import ctypes
from typing import Any

import torch
from torch import Tensor, library

from megatron_npu.virtual.saturation import saturated

NPU, CPU = "npu", torch.device("cpu")
# A buffer has to have some size: more than any tensor has, so that one type serves all.
_ANY_SIZE = ctypes.c_byte * (1 << 46)


def host(t: Tensor) -> Tensor:
    """A CPU tensor over the memory of ``t``, an NPU's, with its shape and strides; keeps ``t`` alive."""
    if t.numel() == 0:
        return torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    memory: Any = _ANY_SIZE.from_address(t.data_ptr())
    memory.owner = t
    length = 1 + sum((n - 1) * step for n, step in zip(t.size(), t.stride(), strict=True))
    return torch.frombuffer(memory, dtype=t.dtype, count=length).as_strided(t.size(), t.stride())


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on a virtual NPU, with its strides unless elements share memory."""
    if 0 in t.stride():
        t = t.contiguous()
    result = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=device)
    if t.numel():
        host(result).copy_(t)
    return result


class Crossing:
    """The way of one call's values from the NPU to the CPU and back.

    Arguments are lent, not copied: what the call writes is in the tensors of the NPU.

    Args:
        name: of the operator, for messages.
        takes_host_tensors: whether a device's operator reads CPU tensors of any shape; otherwise only
            scalars, as on a real device.
    """

    def __init__(self, name: str, takes_host_tensors: bool = False):
        self.device: torch.device | None = None
        self._name, self._takes_host_tensors = name, takes_host_tensors
        self._lent: dict[int, tuple[Tensor, Tensor]] = {}
        self._foreign: Tensor | None = None

    def down(self, value: Any) -> Any:
        """``value`` for the CPU: a tensor, a device, anything else, or lists of them."""
        if isinstance(value, Tensor):
            return self._lend(value) if value.device.type == NPU else self._from_host(value)
        if isinstance(value, list | tuple):
            return [self.down(each) for each in value]
        if isinstance(value, torch.device) and value.type == NPU:
            self.device = value
            return CPU
        return value

    def check(self) -> None:
        """Raises RuntimeError for operands that a real device cannot read together."""
        if self._foreign is not None and self.device is not None and not self._takes_host_tensors:
            raise RuntimeError(
                f"{self._name}: expected all tensors on {self.device}, found one of shape "
                f"{tuple(self._foreign.shape)} on {self._foreign.device}"
            )

    def up(self, value: Any) -> Any:
        """A result for the NPU: an argument itself where the call returned it."""
        if isinstance(value, Tensor):
            if id(value) in self._lent:
                return self._returned(*self._lent[id(value)])
            return to_device(value, self.device) if self.device is not None else value
        if isinstance(value, list | tuple):
            return type(value)(self.up(each) for each in value)
        return value

    def _returned(self, alias: Tensor, t: Tensor) -> Tensor:
        if alias.shape != t.shape:  # an empty result of the caller's, which the call made room in
            t.resize_(alias.shape)
            host(t).copy_(alias)
        return t

    def _lend(self, t: Tensor) -> Tensor:
        if self.device is None or self.device.index is None:
            self.device = t.device
        elif t.device != self.device and t.dim() > 0:
            self._foreign = t
        alias = host(t)
        self._lent[id(alias)] = (alias, t)
        return alias

    def _from_host(self, t: Tensor) -> Tensor:
        if t.dim() > 0 and t.device.type == "cpu":
            self._foreign = t
        return t


def install(aten: library.Library) -> None:
    """Registers what allocates and copies, between devices too."""
    for name, function in {
        "copy_": _copy,
        "_copy_from_and_resize": _copy_from_and_resize,
        "clone": _clone,
        "contiguous": _contiguous,
    }.items():
        aten.impl(name, function, "PrivateUse1")


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
