"""Copies of tokens in the order of their experts, and back."""

from typing import Any

import torch
from torch import Tensor

from megatron_npu import chip
from megatron_npu.registry import FLOATS, replaces

_MOST_CHOICES = 511
_MOST_INDICES = 16_777_214
# Of tokens and weights.
_TYPES = (*((dtype, dtype) for dtype in FLOATS), (torch.bfloat16, torch.float32))
_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_LIMITS = (
    "no tokens, different numbers of experts a token, weights of another type than the tokens (but for fp32 "
    f"with bf16), more than {_MOST_CHOICES} experts a token, over {_MOST_INDICES} rows"
)


def _why_not(
    tokens: Tensor, routing_map: Tensor, probs: Tensor | None, topk: int | None, capacity: int | None
) -> str | None:
    count, experts = routing_map.shape
    if not count or capacity == 0:
        return "no tokens"
    if topk is None and capacity is None:
        return "different numbers of experts a token"
    if probs is not None and (tokens.dtype, probs.dtype) not in _TYPES:
        return "weights of another type than the tokens"
    if topk is not None and topk > _MOST_CHOICES:
        return f"more than {_MOST_CHOICES} experts a token"
    rows = count * topk if topk is not None else experts * (capacity or 0)
    return f"over {_MOST_INDICES} rows" if max(rows, count) > _MOST_INDICES else None


@replaces(
    "megatron.core.fusions.moe_permute.permute_tokens",
    operators=("npu_moe_token_permute_with_routing_map",),
    since="7.2.0",
    chips=chip.FROM_910B,
    unless=_why_not,
    limits=_LIMITS,
    bound=_BOUND,
)
def permute_tokens(
    tokens: Tensor, routing_map: Tensor, probs: Tensor | None, topk: int | None, capacity: int | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """What the operator returns third is what the default does, as int32."""
    count, experts = routing_map.shape
    rows = count * topk if topk is not None else experts * (capacity or 0)
    permuted, row_probs, where = torch.ops.npu.npu_moe_token_permute_with_routing_map(
        tokens, routing_map, probs=probs, num_out_tokens=rows, drop_and_pad=capacity is not None
    )
    return permuted, None if probs is None else row_probs, where


@replaces(
    "megatron.core.fusions.moe_permute.unpermute_tokens",
    operators=("npu_moe_token_unpermute_with_routing_map", "npu_moe_token_permute_with_routing_map"),
    since="7.2.0",
    chips=chip.FROM_910B,
    unless=lambda rows, where, routing_map, probs, topk, capacity: _why_not(
        rows, routing_map, probs, topk, capacity
    ),
    limits=_LIMITS,
    bound=_BOUND,
)
def unpermute_tokens(
    rows: Tensor,
    where: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    topk: int | None,
    capacity: int | None,
) -> Tensor:
    """The operator's own derivative, and the map, serve only where there are weights."""
    if probs is None:
        return _Collect.apply(rows, where.int(), routing_map, capacity is not None)
    return torch.ops.npu.npu_moe_token_unpermute_with_routing_map(
        rows,
        where.int(),
        [len(routing_map), rows.shape[1]],
        probs=probs,
        routing_map=routing_map,
        drop_and_pad=capacity is not None,
    )


class _Collect(torch.autograd.Function):
    """Sums without weights. The gradient is what permuting its tokens gives, so that the rows, which the
    operator's own derivative keeps until then, need not be kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, where: Tensor, routing_map: Tensor, padded: bool) -> Tensor:
        ctx.save_for_backward(routing_map)
        ctx.rows, ctx.padded = len(rows), padded
        shape = [len(routing_map), rows.shape[1]]
        return torch.ops.npu.npu_moe_token_unpermute_with_routing_map(rows, where, shape, drop_and_pad=padded)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (routing_map,) = ctx.saved_tensors
        grad_rows = torch.ops.npu.npu_moe_token_permute_with_routing_map(
            grad.contiguous(), routing_map, num_out_tokens=ctx.rows, drop_and_pad=ctx.padded
        )[0]
        return grad_rows, None, None, None
