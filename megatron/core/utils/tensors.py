"""Scratch buffers, tensors without a base, and other handling of single tensors."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

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


def get_data_parallel_group_if_dtensor(
    tensor: Tensor, data_parallel_group: ProcessGroup | None = None
) -> ProcessGroup | None:
    """The group over which a DTensor is spread; None for any other tensor.

    Args:
        data_parallel_group: the group expected, if any.

    Raises:
        MegatronError: the tensor is spread over another one.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return None
    group = mesh.get_group()
    if data_parallel_group is not None and group != data_parallel_group:
        raise UsageError(
            f"a DTensor of shape {tuple(tensor.shape)} is spread over another group than expected"
        )
    return group


def get_full_tensor_if_necessary(tensor: Tensor) -> Tensor:
    """The whole of a DTensor if some ranks hold none of it; else the tensor as it is.

    Ranks that come after the last row of the first dimension hold nothing.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None or tensor.dim() == 0 or tensor.shape[0] % mesh.size() == 0:
        return tensor
    per_rank = -(-tensor.shape[0] // mesh.size())
    holders = -(-tensor.shape[0] // per_rank)
    return tensor.full_tensor() if holders < mesh.size() else tensor


def prepare_input_tensors_for_wgrad_compute(
    grad_output: Tensor, all_gathered_input: Tensor
) -> tuple[Tensor, Tensor]:
    """Both operands of a weight gradient, contiguous and 2-D.  [s, b, h] -> [s*b, h]"""
    return (
        grad_output.contiguous().view(-1, grad_output.shape[-1]),
        all_gathered_input.contiguous().view(-1, all_gathered_input.shape[-1]),
    )


def drain_embedding_wgrad_compute(
    config: Any,
    embedding_activation_buffer: list[Tensor],
    grad_output_buffer: list[Tensor],
    weight: Tensor,
) -> None:
    """Adds the weight gradients of an output layer that were left for later to ``weight.main_grad``.

    Args:
        config: ``sequence_parallel`` says that activations are this rank's part of the sequence.
        embedding_activation_buffer: inputs of the layer, one per micro-batch, [s, b, h] or [s/TP, b, h].
        grad_output_buffer: gradients of its outputs in the same order, [s, b, v/TP]; both are emptied.
        weight: [v/TP, h]; without a ``main_grad`` its ``grad`` is added to.

    Raises:
        UsageError: buffers of different lengths.
    """
    from megatron.core.fusions.matmul import accumulate_weight_gradient, weight_gradient
    from megatron.core.tensor_parallel.mappings import _gather_along_first_dim

    if len(embedding_activation_buffer) != len(grad_output_buffer):
        raise UsageError(
            f"{len(embedding_activation_buffer)} activations of the output layer but "
            f"{len(grad_output_buffer)} gradients: empty the first buffer with "
            "clear_embedding_activation_buffer() before each step"
        )
    with torch.no_grad():
        while grad_output_buffer:
            x, grad_output = embedding_activation_buffer.pop(0), grad_output_buffer.pop(0)
            whole = _gather_along_first_dim(x) if config.sequence_parallel else x
            operands = prepare_input_tensors_for_wgrad_compute(grad_output, whole)
            if getattr(weight, "main_grad", None) is not None:
                accumulate_weight_gradient(weight.main_grad, *operands)
                weight.grad_added_to_main_grad = True
            else:
                grad = weight_gradient(*operands)
                weight.grad = grad if weight.grad is None else weight.grad + grad
