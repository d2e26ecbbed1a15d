"""Moving activations between the whole and the slices held by tensor-parallel ranks.

Every function is one autograd node whose backward is the transpose of its forward. All take the group to work
in, by default the tensor-parallel one; in a group of one rank the whole is the slice, and they return their
input without a node in the graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import collectives, parallel_state
from megatron.core.collectives import group_rank, group_size, tensor_group
from megatron.core.utils import divide

TensorMapping = Callable[[Tensor, ProcessGroup | None], Tensor]


# ---- what happens to the numbers -----------------------------------------------------------------------


def _same(x: Tensor, group: ProcessGroup | None) -> Tensor:
    return x


def _sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sum over the ranks, in a tensor of its own: autograd may still need ``x``."""
    if group_size(group) == 1:
        return x
    total = x.clone(memory_format=torch.contiguous_format)
    collectives.all_reduce(total, group)
    return total


def _own_first(x: Tensor, group: ProcessGroup | None, sizes: list[int] | None = None) -> Tensor:
    """[s, ...] -> [s/ranks, ...], or [sizes[rank], ...]"""
    if group_size(group) == 1:
        return x
    if sizes is None:
        sizes = [divide(x.shape[0], group_size(group))] * group_size(group)
    return x.split(sizes)[group_rank(group)].contiguous()


def _gather_first(
    x: Tensor, group: ProcessGroup | None, sizes: list[int] | None = None, use_global_buffer: bool = False
) -> Tensor:
    """[s/ranks, ...] -> [s, ...]"""
    if group_size(group) == 1:
        return x
    if sizes is not None:
        return collectives.all_gather_uneven(x, sizes, group)
    output = _output(x, [x.shape[0] * group_size(group), *x.shape[1:]], use_global_buffer)
    collectives.all_gather(output, x, group)
    return output


def _reduce_scatter_first(
    x: Tensor, group: ProcessGroup | None, sizes: list[int] | None = None, use_global_buffer: bool = False
) -> Tensor:
    """[s, ...] -> [s/ranks, ...], summed over the ranks"""
    if group_size(group) == 1:
        return x
    if sizes is not None:
        return collectives.reduce_scatter_uneven(x, sizes, group)
    output = _output(x, [divide(x.shape[0], group_size(group)), *x.shape[1:]], use_global_buffer)
    collectives.reduce_scatter(output, x, group)
    return output


def _output(like: Tensor, shape: list[int], use_global_buffer: bool) -> Tensor:
    """Memory for a result: new, or the shared scratch buffer, which the next such result overwrites."""
    if use_global_buffer:
        return parallel_state.get_global_memory_buffer().get_tensor(shape, like.dtype, "mpu")
    return like.new_empty(shape)


def _own_last(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """[..., h] -> [..., h/ranks]"""
    width = divide(x.shape[-1], group_size(group))
    return x.split(width, dim=-1)[group_rank(group)].contiguous()


def _gather_last(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """[..., h/ranks] -> [..., h]"""
    if group_size(group) == 1:
        return x
    # [...] -> [ranks, ...] -> ranks slices side by side
    return torch.cat(_gather_first(x.unsqueeze(0), group).unbind(), dim=-1)


def _reduce_scatter_last(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """[..., h] -> [..., h/ranks], summed over the ranks"""
    ranks = group_size(group)
    if ranks == 1:
        return x
    # [..., h] -> [ranks, ..., h/ranks]
    parts = torch.stack(x.split(divide(x.shape[-1], ranks), dim=-1))
    return _reduce_scatter_first(parts, group).squeeze(0)


# ---- autograd nodes ------------------------------------------------------------------------------------


def _node(name: str, forward: TensorMapping, backward: TensorMapping) -> type[torch.autograd.Function]:
    """An autograd function ``apply(input_, group=None)`` made of a mapping and its transpose."""

    def run(ctx: Any, input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
        ctx.group, ctx.group_given = tensor_group(group), group is not None
        return forward(input_, ctx.group)

    def run_back(ctx: Any, grad_output: Tensor) -> Tensor | tuple[Tensor, None]:
        grad = backward(grad_output, tensor_group(getattr(ctx, "group", None)))
        return (grad, None) if getattr(ctx, "group_given", False) else grad

    def symbolic(graph: Any, input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
        return forward(input_, tensor_group(group))

    members = {"forward": run, "backward": run_back, "symbolic": symbolic}
    return type(
        name,
        (torch.autograd.Function,),
        {
            "__module__": __name__,
            "__doc__": f"Node of forward {forward.__name__}, backward {backward.__name__}.",
            **{key: staticmethod(function) for key, function in members.items()},
        },
    )


_CopyToModelParallelRegion = _node("_CopyToModelParallelRegion", _same, _sum)
_ReduceFromModelParallelRegion = _node("_ReduceFromModelParallelRegion", _sum, _same)
_ScatterToModelParallelRegion = _node("_ScatterToModelParallelRegion", _own_last, _gather_last)
_GatherFromModelParallelRegion = _node("_GatherFromModelParallelRegion", _gather_last, _own_last)
_ScatterToSequenceParallelRegion = _node("_ScatterToSequenceParallelRegion", _own_first, _gather_first)
_AllGatherFromTensorParallelRegion = _node(
    "_AllGatherFromTensorParallelRegion", _gather_last, _reduce_scatter_last
)
_ReduceScatterToTensorParallelRegion = _node(
    "_ReduceScatterToTensorParallelRegion", _reduce_scatter_last, _gather_last
)


class _GatherFromSequenceParallelRegion(torch.autograd.Function):
    """Node of :func:`gather_from_sequence_parallel_region`."""

    @staticmethod
    def symbolic(
        graph: Any,
        input_: Tensor,
        tensor_parallel_output_grad: bool = True,
        group: ProcessGroup | None = None,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        return _gather_first(input_, tensor_group(group), output_split_sizes, use_global_buffer)

    @staticmethod
    def forward(
        ctx: Any,
        input_: Tensor,
        tensor_parallel_output_grad: bool = True,
        group: ProcessGroup | None = None,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        ctx.tensor_parallel_output_grad = tensor_parallel_output_grad
        ctx.group, ctx.output_split_sizes = tensor_group(group), output_split_sizes
        ctx.use_global_buffer = use_global_buffer
        return _gather_first(input_, ctx.group, output_split_sizes, use_global_buffer)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        group, sizes = tensor_group(getattr(ctx, "group", None)), getattr(ctx, "output_split_sizes", None)
        if getattr(ctx, "tensor_parallel_output_grad", True):
            buffered = getattr(ctx, "use_global_buffer", False)
            grad = _reduce_scatter_first(grad_output, group, sizes, buffered)
        else:
            grad = _own_first(grad_output, group, sizes)
        return grad, None, None, None, None


class _ReduceScatterToSequenceParallelRegion(torch.autograd.Function):
    """Node of :func:`reduce_scatter_to_sequence_parallel_region`."""

    @staticmethod
    def symbolic(
        graph: Any,
        input_: Tensor,
        group: ProcessGroup | None = None,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        return _reduce_scatter_first(input_, tensor_group(group), input_split_sizes, use_global_buffer)

    @staticmethod
    def forward(
        ctx: Any,
        input_: Tensor,
        group: ProcessGroup | None = None,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        ctx.group, ctx.input_split_sizes = tensor_group(group), input_split_sizes
        ctx.use_global_buffer = use_global_buffer
        return _reduce_scatter_first(input_, ctx.group, input_split_sizes, use_global_buffer)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        group, sizes = tensor_group(getattr(ctx, "group", None)), getattr(ctx, "input_split_sizes", None)
        grad = _gather_first(grad_output, group, sizes, getattr(ctx, "use_global_buffer", False))
        return grad, None, None, None


class _AllToAll(torch.autograd.Function):
    """Node of :func:`all_to_all`."""

    @staticmethod
    def forward(
        ctx: Any,
        group: ProcessGroup | None,
        input: Tensor,
        output_split_sizes: list[int] | None,
        input_split_sizes: list[int] | None,
    ) -> Tensor:
        ctx.group, ctx.sizes = group, (input_split_sizes, output_split_sizes)
        return collectives.exchange(input, group, output_split_sizes, input_split_sizes)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return None, _AllToAll.apply(ctx.group, grad_output, *ctx.sizes), None, None


# ---- functions -----------------------------------------------------------------------------------------


def _apply(node: type[torch.autograd.Function], input_: Tensor, group: ProcessGroup | None) -> Tensor:
    if group_size(tensor_group(group)) == 1:
        return input_
    return node.apply(input_) if group is None else node.apply(input_, group)


def copy_to_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Forward: identity; backward: sum over the ranks."""
    return _apply(_CopyToModelParallelRegion, input_, group)


def reduce_from_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Forward: sum over the ranks; backward: identity."""
    return _apply(_ReduceFromModelParallelRegion, input_, group)


def scatter_to_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Forward: own slice of the last dimension; backward: gather.  [..., h] -> [..., h/TP]"""
    return _apply(_ScatterToModelParallelRegion, input_, group)


def gather_from_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Forward: gather the last dimension; backward: own slice.  [..., h/TP] -> [..., h]"""
    return _apply(_GatherFromModelParallelRegion, input_, group)


def scatter_to_sequence_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Forward: own slice of the first dimension; backward: gather.  [s, ...] -> [s/TP, ...]"""
    return _apply(_ScatterToSequenceParallelRegion, input_, group)


def gather_from_sequence_parallel_region(
    input_: Tensor,
    tensor_parallel_output_grad: bool = True,
    group: ProcessGroup | None = None,
    output_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """Forward: gather the first dimension; backward: reduce-scatter, or own slice.  [s/TP, ...] -> [s, ...]

    Args:
        input_: own part.
        tensor_parallel_output_grad: ranks have different gradients of the whole, to be summed; False says
            that they have the same one.
        group: ranks that share the whole.
        output_split_sizes: lengths of the ranks' parts; equal by default.
        use_global_buffer: put the result into the scratch buffer, to be used before the next such call.
    """
    if group_size(tensor_group(group)) == 1:
        return input_
    return _GatherFromSequenceParallelRegion.apply(
        input_, tensor_parallel_output_grad, group, output_split_sizes, use_global_buffer
    )


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor,
    group: ProcessGroup | None = None,
    input_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """Forward: reduce-scatter the first dimension; backward: gather.  [s, ...] -> [s/TP, ...]"""
    if group_size(tensor_group(group)) == 1:
        return input_
    return _ReduceScatterToSequenceParallelRegion.apply(input_, group, input_split_sizes, use_global_buffer)


def all_gather_last_dim_from_tensor_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None
) -> Tensor:
    """Forward: gather the last dimension; backward: reduce-scatter.  [..., h/TP] -> [..., h]"""
    return _apply(_AllGatherFromTensorParallelRegion, input_, group)


def reduce_scatter_last_dim_to_tensor_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None
) -> Tensor:
    """Forward: reduce-scatter the last dimension; backward: gather.  [..., h] -> [..., h/TP]"""
    return _apply(_ReduceScatterToTensorParallelRegion, input_, group)


def all_to_all(
    group: ProcessGroup | None,
    input_: Tensor,
    output_split_sizes_: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
) -> Tensor:
    """Sends part r of the first dimension to rank r of ``group`` and joins what arrives.

    Args:
        group: ranks that take part; None means this one alone.
        input_: [sum(input_split_sizes), ...].
        output_split_sizes_, input_split_sizes: lengths of the parts from and to every rank; equal by default.
    """
    if group_size(group) == 1:
        return input_
    return _AllToAll.apply(group, input_, output_split_sizes_, input_split_sizes)


def all_to_all_sp2hp(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[tokens/TP, ..., h] -> [tokens, h/TP]: every token, but a slice of its channels."""
    group = tensor_group(group)
    ranks = group_size(group)
    if ranks == 1:
        return input_
    rows = input_.reshape(-1, input_.shape[-1])
    # [tokens/TP, h] -> [TP * tokens/TP, h/TP]: the slice of rank r at place r
    parts = torch.cat(rows.split(divide(rows.shape[-1], ranks), dim=-1))
    return all_to_all(group, parts)


def all_to_all_hp2sp(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """[tokens, ..., h/TP] -> [tokens/TP, h]: a slice of the tokens, with all their channels."""
    group = tensor_group(group)
    ranks = group_size(group)
    if ranks == 1:
        return input_
    received = all_to_all(group, input_.reshape(-1, input_.shape[-1]))
    # [TP * tokens/TP, h/TP] -> [tokens/TP, h]
    return torch.cat(received.split(divide(received.shape[0], ranks)), dim=-1)


# ---- the steps themselves, without a gradient, under the names that other projects call them by ---------


def _reduce(input_: Tensor) -> Tensor:
    """Sum over the tensor-parallel ranks, in place where ``input_`` is contiguous."""
    total = input_.contiguous()
    collectives.all_reduce(total, tensor_group())
    return total


def _gather_along_first_dim(
    input_: Tensor,
    group: ProcessGroup | None = None,
    output_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """[s/ranks, ...] -> [s, ...]; arguments as of :func:`gather_from_sequence_parallel_region`."""
    return _gather_first(input_, tensor_group(group), output_split_sizes, use_global_buffer)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _split_along_last_dim(input_: Tensor) -> Tensor:
    """[..., h] -> [..., h/TP], this rank's."""
    return _own_last(input_, tensor_group())


def _split_along_first_dim(input_: Tensor) -> Tensor:
    """[s, ...] -> [s/TP, ...], this rank's."""
    return _own_first(input_, tensor_group())


def _gather_along_last_dim(input_: Tensor) -> Tensor:
    """[..., h/TP] -> [..., h]"""
    return _gather_last(input_, tensor_group())


def _reduce_scatter_along_last_dim(input_: Tensor) -> Tensor:
    """[..., h] -> [..., h/TP], summed over the ranks."""
    return _reduce_scatter_last(input_, tensor_group())


def _reduce_scatter_along_first_dim(
    input_: Tensor,
    group: ProcessGroup | None = None,
    input_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> Tensor:
    """[s, ...] -> [s/ranks, ...]; arguments as of :func:`reduce_scatter_to_sequence_parallel_region`."""
    return _reduce_scatter_first(input_, tensor_group(group), input_split_sizes, use_global_buffer)
