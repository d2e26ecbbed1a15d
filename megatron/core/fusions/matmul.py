"""Matmuls: of linear layers, of one expert after the other, and with the collectives of a split layer.

A device may have kernels that send one part of an operand or a result while they multiply another. Letters
of grouped matmuls: m rows in the order of their experts, E experts, k and n channels of input and output.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import accelerator, collectives
from megatron.core.collectives import group_size
from megatron.core.errors import ConfigError
from megatron.core.overrides import overridable
from megatron.core.utils import divide


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
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


@overridable
def accumulate_weight_gradient(main_grad: Tensor, grad_output: Tensor, x: Tensor) -> None:
    """``main_grad += grad_output^T x``, in place.

    main_grad: [out, in], usually fp32; grad_output: [tokens, out]; x: [tokens, in]. The matmul is rounded
    to the dtype of ``x`` before it is added, so that accumulating here or after the backward pass gives the
    same bits.
    """
    main_grad.add_(weight_gradient(grad_output, x))


def weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    """``grad_output^T x``.  [tokens, out], [tokens, in] -> [out, in], in the dtype of ``x``."""
    compute = accelerator.matmul_compute_dtype(x.dtype, x.device)
    return grad_output.to(compute).t().matmul(x.to(compute)).to(x.dtype)


def grouped_matmul(
    x: Tensor, weight: Tensor, tokens_per_expert: Tensor, gradient_accumulation_fusion: bool
) -> Tensor:
    """``x_e W_e`` for the rows ``x_e`` of every expert.

    Args:
        x: [m, k], expert 0's rows first.
        weight: E blocks [k, n], one after the other, whatever the shape of the parameter.
        tokens_per_expert: [E] integers that add up to m, on the host or the device.
        gradient_accumulation_fusion: add the weight's gradient to ``weight.main_grad`` in backward (where
            the weight has one) and set ``weight.grad_added_to_main_grad``.

    Returns:
        [m, n] in the dtype of ``x``.

    Raises:
        ConfigError: operands whose shapes do not fit (rows are counted on a CPU only, where looking is free).
    """
    experts, width = len(tokens_per_expert), x.shape[1]
    if not weight.is_contiguous() or not width or weight.numel() % max(experts * width, 1):
        raise ConfigError(
            f"a weight of shape {tuple(weight.shape)} is not {experts} blocks of {width} rows, one after the "
            "other: its size has to be a multiple of both"
        )
    if tokens_per_expert.device.type == accelerator.CPU and int(tokens_per_expert.sum()) != len(x):
        raise ConfigError(f"{len(x)} rows, but {int(tokens_per_expert.sum())} tokens of all experts")
    return _GroupedMatmul.apply(x, weight, tokens_per_expert, gradient_accumulation_fusion)


@overridable
def grouped_mm(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """``x_e W_e``, rounded once, without derivative.  x: [m, k], weight: [E, k, n] -> [m, n]

    The last two dimensions of ``weight`` may be a transposed view.
    """
    if _has_one_call(x, weight):
        return F.grouped_mm(x, weight, offs=_ends(tokens_per_expert, x.device).int())
    compute = accelerator.matmul_compute_dtype(x.dtype, x.device)
    out = x.new_empty(len(x), weight.shape[2])
    for rows, one in zip(_rows_of_experts(tokens_per_expert), weight.unbind(), strict=True):
        if compute == x.dtype:
            torch.mm(x[rows], one, out=out[rows])
        elif rows.stop > rows.start:  # an expert without rows need not be widened
            out[rows] = x[rows].to(compute).mm(one.to(compute))
    return out


@overridable
def grouped_weight_gradient(x: Tensor, grad_output: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """``x_e^T g_e`` of every expert; 0 for one without rows.  [m, k], [m, n] -> [E, k, n]"""
    if _has_one_call(x, grad_output):
        ends = _ends(tokens_per_expert, x.device)
        return F.grouped_mm(x.t(), grad_output, offs=ends.int())
    compute = accelerator.matmul_compute_dtype(x.dtype, x.device)
    grads = x.new_empty(len(tokens_per_expert), x.shape[1], grad_output.shape[1])
    for grad, rows in zip(grads, _rows_of_experts(tokens_per_expert), strict=True):
        if compute == x.dtype:
            torch.mm(x[rows].t(), grad_output[rows], out=grad)
        else:
            grad.copy_(weight_gradient(x[rows], grad_output[rows]))
    return grads


@overridable
def accumulate_grouped_weight_gradient(
    x: Tensor, grad_output: Tensor, tokens_per_expert: Tensor, main_grad: Tensor
) -> None:
    """``main_grad_e += x_e^T g_e`` of every expert, in place.  main_grad: [E, k, n], usually fp32

    Matmuls are rounded to the dtype of ``x`` first, as in ``accumulate_weight_gradient``.
    """
    if _has_one_call(x, grad_output):
        main_grad.add_(grouped_weight_gradient(x, grad_output, tokens_per_expert))
        return
    for grad, rows in zip(main_grad, _rows_of_experts(tokens_per_expert), strict=True):
        if rows.stop > rows.start:
            accumulate_weight_gradient(grad, x[rows], grad_output[rows])


class _GroupedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, tokens_per_expert: Tensor, gradient_accumulation_fusion: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, tokens_per_expert)
        ctx.into_main_grad = gradient_accumulation_fusion
        blocks = weight.view(len(tokens_per_expert), x.shape[1], -1)
        return grouped_mm(x, blocks, tokens_per_expert)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, tokens_per_expert = ctx.saved_tensors
        blocks = weight.view(len(tokens_per_expert), x.shape[1], -1)
        grad_output = grad_output.contiguous()
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_mm(grad_output, blocks.transpose(1, 2), tokens_per_expert)
        if ctx.needs_input_grad[1] and ctx.into_main_grad and getattr(weight, "main_grad", None) is not None:
            main_grad = weight.main_grad.view(blocks.shape)
            accumulate_grouped_weight_gradient(x, grad_output, tokens_per_expert, main_grad)
            weight.grad_added_to_main_grad = True
            # The parameter's hooks fire only if some gradient arrives; nobody reads this one.
            grad_weight = torch.empty_like(weight)
        elif ctx.needs_input_grad[1]:
            grad_weight = grouped_weight_gradient(x, grad_output, tokens_per_expert).view(weight.shape)
        return grad_x, grad_weight, None, None


def _ends(tokens_per_expert: Tensor, device: torch.device) -> Tensor:
    """[E] row after the last of each expert."""
    return tokens_per_expert.to(device).cumsum(0)


def _rows_of_experts(tokens_per_expert: Tensor) -> Iterator[slice]:
    """Rows of one expert after the other. The host waits for the numbers if they are on a device."""
    start = 0
    for count in tokens_per_expert.tolist():
        yield slice(start, start + count)
        start += count


def _has_one_call(*operands: Tensor) -> bool:
    """True where one call of torch's multiplies all experts; a CPU is not faster with it."""
    return hasattr(F, "grouped_mm") and all(
        t.dtype == torch.bfloat16 and t.device.type != accelerator.CPU and _is_aligned(t) for t in operands
    )


def _is_aligned(t: Tensor) -> bool:
    """Whether it has elements, and every row (or column, if transposed) starts at a multiple of 16 bytes."""
    starts = [t.data_ptr(), *(stride * t.element_size() for stride in t.stride() if stride != 1)]
    return t.numel() > 0 and all(start % 16 == 0 for start in starts)


@overridable
def all_gather_matmul(
    x: Tensor, matrix: Tensor, group: ProcessGroup | None, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Joins the ranks' rows in the order of the ranks and multiplies them; without derivative.

    x: [m, k], this rank's rows; matrix: [k, n], contiguous or a transposed view; both of one dtype.
    -> [m * ranks, n], and what was gathered, [m * ranks, k], or None unless ``keep``.
    """
    whole = x.new_empty(x.shape[0] * group_size(group), x.shape[1])
    collectives.all_gather(whole, x, group)
    return linear_forward(whole, matrix.t()), whole if keep else None


@overridable
def matmul_reduce_scatter(x: Tensor, matrix: Tensor, group: ProcessGroup | None) -> Tensor:
    """Sums ``x matrix`` over the ranks; rank r gets part r of the rows; without derivative.

    x: [m, k], with m a multiple of the number of ranks; matrix: [k, n], contiguous or a transposed view; both
    of one dtype. -> [m / ranks, n]
    """
    partial = linear_forward(x, matrix.t())
    out = partial.new_empty(divide(x.shape[0], group_size(group)), matrix.shape[1])
    collectives.reduce_scatter(out, partial, group)
    return out
