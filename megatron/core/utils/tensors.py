"""Weight initialisers, tensors without a base, and other handling of single tensors."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.errors import UsageError

InitMethod = Callable[[Tensor], Tensor]


def mark(tensor: Tensor, **facts: Any) -> None:
    """Sets attributes on a parameter that DDP, the optimizer or checkpoints read with ``getattr``."""
    for name, value in facts.items():
        setattr(tensor, name, value)


class _Normal:
    """Fills with N(0, std).  A class, not a closure, so that configs can be pickled and compared."""

    def __init__(self, std: float):
        self.std = std

    def __call__(self, tensor: Tensor) -> Tensor:
        return torch.nn.init.normal_(tensor, mean=0.0, std=self.std)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Normal) and other.std == self.std

    def __hash__(self) -> int:
        return hash(self.std)

    def __repr__(self) -> str:
        return f"normal(std={self.std:g})"


def init_method_normal(sigma: float) -> InitMethod:
    """Initialiser drawing from N(0, sigma)."""
    return _Normal(sigma)


def scaled_init_method_normal(sigma: float, num_layers: int, multiplier: float = 2.0) -> InitMethod:
    """Initialiser drawing from N(0, sigma / sqrt(multiplier * num_layers)).

    For the layers that write into the residual stream, of which there are ``multiplier`` per layer, so that
    the stream's variance does not grow with depth (GPT-2 report, section 2.3).
    """
    return _Normal(sigma / math.sqrt(multiplier * num_layers))


def xavier_uniform_init_method(tensor: Tensor) -> Tensor:
    """Fills with U(-a, a), a = sqrt(6 / (fan in + fan out))."""
    return torch.nn.init.xavier_uniform_(tensor)


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


def prepare_input_tensors_for_wgrad_compute(
    grad_output: Tensor, all_gathered_input: Tensor
) -> tuple[Tensor, Tensor]:
    """Both operands of a weight gradient, contiguous and 2-D.  [s, b, h] -> [s*b, h]"""
    return (
        grad_output.contiguous().view(-1, grad_output.shape[-1]),
        all_gathered_input.contiguous().view(-1, all_gathered_input.shape[-1]),
    )


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


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
    return cast(Any, tensor).full_tensor() if holders < mesh.size() else tensor
