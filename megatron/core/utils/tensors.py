"""Scratch buffers, tensors without a base, and other handling of single tensors."""

import math
from typing import Any

import torch
from torch import Tensor

from megatron.core.errors import UsageError


class GlobalMemoryBuffer:
    """Scratch tensors that live as long as the process, one per name and dtype, grown on demand."""

    def __init__(self) -> None:
        self.buffer: dict[tuple[str, torch.dtype], Tensor] = {}

    def get_tensor(self, tensor_shape: torch.Size | list[int], dtype: torch.dtype, name: str) -> Tensor:
        """View of the buffer ``name`` in the wanted shape, on the current device; contents are undefined."""
        from megatron.core import accelerator

        numel = math.prod(tensor_shape)
        held = self.buffer.get((name, dtype))
        if held is None or held.numel() < numel:
            held = torch.empty(numel, dtype=dtype, device=accelerator.current_device(), requires_grad=False)
            self.buffer[(name, dtype)] = held
        return held[:numel].view(tuple(tensor_shape))


class WrappedTensor:
    """Box that hands its tensor out once, so that the callee holds the only reference and can free it."""

    def __init__(self, tensor: Tensor):
        self._tensor: Tensor | None = tensor

    def unwrap(self) -> Tensor:
        """The tensor; a second call is an error."""
        if self._tensor is None:
            raise UsageError("this WrappedTensor was unwrapped before; keep the tensor it returned")
        tensor, self._tensor = self._tensor, None
        return tensor


def _share_data(tensor: Tensor, requires_grad: bool) -> Tensor:
    """A tensor over the same memory that is not a view of another tensor."""
    out = torch.empty((1,), dtype=tensor.dtype, device=tensor.device, requires_grad=requires_grad)
    out.data = tensor.data
    return out


class MakeViewlessTensor(torch.autograd.Function):
    """Autograd form of :func:`make_viewless_tensor`: gradients pass through unchanged."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, requires_grad: bool) -> Tensor:
        return _share_data(inp, requires_grad)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


def make_viewless_tensor(inp: Tensor, requires_grad: bool, keep_graph: bool) -> Tensor:
    """The same data without a base, so that freeing it frees memory.

    Args:
        inp: returned as it is if it has no base.
        requires_grad: of the result.
        keep_graph: connect the result to the graph of ``inp``.
    """
    if inp._base is None:
        return inp
    if keep_graph:
        return MakeViewlessTensor.apply(inp, requires_grad)
    return _share_data(inp, requires_grad)


def assert_viewless_tensor(tensor: Any, extra_msg: str | None = None) -> Any:
    """Returns ``tensor`` (or a list of tensors), after checking that none is a view of another."""
    if isinstance(tensor, list):
        return [assert_viewless_tensor(item, extra_msg) for item in tensor]
    if isinstance(tensor, Tensor) and tensor._base is not None:
        raise UsageError(f"a view keeps its base of shape {tuple(tensor._base.shape)} alive. {extra_msg}")
    return tensor


def safely_set_viewless_tensor_data(tensor: Tensor, new_data_tensor: Tensor) -> None:
    """Replaces ``tensor.data``, after checking that ``tensor`` is no view."""
    assert_viewless_tensor(tensor, "its data cannot be replaced")
    tensor.data = new_data_tensor


def to_local_if_dtensor(tensor: Tensor) -> Tensor:
    """Local shard of a DTensor; any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def prepare_input_tensors_for_wgrad_compute(
    grad_output: Tensor, all_gathered_input: Tensor
) -> tuple[Tensor, Tensor]:
    """Both operands of a weight gradient, contiguous and 2-D.  [s, b, h] -> [s*b, h]"""
    return (
        grad_output.contiguous().view(-1, grad_output.shape[-1]),
        all_gathered_input.contiguous().view(-1, all_gathered_input.shape[-1]),
    )
