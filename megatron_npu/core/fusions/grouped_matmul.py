"""One matrix product per expert."""

import torch
from torch import Tensor

from megatron_npu import chip
from megatron_npu.registry import replaces

_POINTS = "megatron.core.fusions.grouped_matmul."
_MOST_EXPERTS = 1024
_WIDEST = 65535
_LIMITS = f"no rows, more than {_MOST_EXPERTS} experts, more than {_WIDEST} channels"
_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# One result, not one for each expert.
_ONE_RESULT = 3
_BY_ROW_OF_X, _BY_SUMMED_ROW = 0, 2


def _why_not_shape(rows: int, experts: int, *widths: int) -> str | None:
    if not rows:
        return "no rows"
    if experts > _MOST_EXPERTS:
        return f"more than {_MOST_EXPERTS} experts"
    return f"more than {_WIDEST} channels" if max(widths) > _WIDEST else None


def _why_host_counts() -> str | None:
    """The first releases took the ends as a list of the host's, for which it would have to wait."""
    packet = torch.ops.npu.npu_grouped_matmul
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    types = {str(argument.type) for s in schemas for argument in s.arguments if argument.name == "group_list"}
    return (
        None if "Optional[Tensor]" in types else "npu_grouped_matmul of this torch_npu takes no device counts"
    )


def _ends(tokens_per_expert: Tensor, device: torch.device) -> Tensor:
    return tokens_per_expert.to(device, torch.int64).cumsum(0)


@replaces(
    _POINTS + "grouped_product",
    operators=("npu_grouped_matmul",),
    since="6.0.rc1",
    chips=chip.FROM_910B,
    only_if=_why_host_counts,
    unless=lambda x, weight, tokens_per_expert: _why_not_shape(len(x), *weight.shape),
    limits=_LIMITS,
    bound=_BOUND,
)
def grouped_product(x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """The operator takes transposed weights, but no transposed rows."""
    return torch.ops.npu.npu_grouped_matmul(
        [x.contiguous()],
        [weight],
        group_list=_ends(tokens_per_expert, x.device),
        split_item=_ONE_RESULT,
        group_type=_BY_ROW_OF_X,
    )[0]


@replaces(
    _POINTS + "grouped_weight_gradient",
    operators=("npu_grouped_matmul",),
    since="6.0.rc1",
    chips=chip.FROM_910B,
    only_if=_why_host_counts,
    unless=lambda x, grad_output, tokens_per_expert: _why_not_shape(
        len(x), len(tokens_per_expert), x.shape[1], grad_output.shape[1]
    ),
    limits=_LIMITS,
    bound=_BOUND,
)
def grouped_weight_gradient(x: Tensor, grad_output: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """The documents do not say what an expert without rows gets, so its zeros are written here."""
    ends = _ends(tokens_per_expert, x.device)
    grads = torch.ops.npu.npu_grouped_matmul(
        [x.contiguous().t()],
        [grad_output.contiguous()],
        group_list=ends,
        split_item=_ONE_RESULT,
        group_type=_BY_SUMMED_ROW,
    )[0]
    return grads.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0).view(-1, 1, 1), 0.0)


def _cannot_add(x: Tensor, grad_output: Tensor, tokens_per_expert: Tensor, main_grad: Tensor) -> str | None:
    if main_grad.dtype != torch.float32:
        return "other sums than fp32"
    return _why_not_shape(len(x), len(tokens_per_expert), x.shape[1], grad_output.shape[1])


@replaces(
    _POINTS + "accumulate_grouped_weight_gradient",
    operators=("npu_grouped_matmul_add_",),
    since="7.1.0",
    chips=chip.FROM_910B,
    dtypes=(torch.float16, torch.bfloat16),
    unless=_cannot_add,
    limits=f"fp32 operands, other sums than fp32, {_LIMITS}",
    bound=_BOUND,
    note="products are added as fp32; the default rounds them to the type of the operands first",
)
def accumulate_grouped_weight_gradient(
    x: Tensor, grad_output: Tensor, tokens_per_expert: Tensor, main_grad: Tensor
) -> None:
    """The operator transposes the rows itself."""
    torch.ops.npu.npu_grouped_matmul_add_(
        main_grad, x.contiguous(), grad_output.contiguous(), _ends(tokens_per_expert, x.device)
    )
