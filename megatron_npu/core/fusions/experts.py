"""The experts of each token and their weights; copies of tokens in the order of their experts, and back."""

from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.experts import SCORE_SUM_EPSILON
from megatron_npu import chip
from megatron_npu.registry import FLOATS, replaces

_MOST_EXPERTS = 2048
_GROUP_ALIGNMENT = 32
_SOFTMAX, _SIGMOID = 0, 1
_MOST_CHOICES = 511
_MOST_INDICES = 16_777_214
# Of tokens and weights.
_TYPES = (*((dtype, dtype) for dtype in FLOATS), (torch.bfloat16, torch.float32))
_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_LIMITS = (
    "no tokens, different numbers of experts a token, weights of another type than the tokens (but for fp32 "
    f"with bf16), more than {_MOST_CHOICES} experts a token, over {_MOST_INDICES} rows"
)


def _unsuitable_for_gating(
    logits: Tensor,
    topk: int,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    expert_bias: Tensor | None = None,
) -> str | None:
    groups = num_groups or 1
    size = logits.shape[-1] // groups
    if not len(logits):
        return "no tokens"
    if score_function == "sigmoid" and topk == 1:
        return "one expert by its sigmoid"  # the operator would divide it by itself
    if size <= 2 or groups * -(-size // _GROUP_ALIGNMENT) * _GROUP_ALIGNMENT > _MOST_EXPERTS:
        return f"groups of 2 or fewer, or over {_MOST_EXPERTS} experts"
    if group_topk is None:
        return None
    best = topk // group_topk
    # Sums of two logits rank groups in another order than sums of two probabilities.
    most = 1 if score_function == "softmax" and not pre_softmax else 2
    return "groups ranked by more than two experts, or by two logits" if best > most else None


@replaces(
    "megatron.core.fusions.experts.topk_routing",
    operators=("npu_moe_gating_top_k",),
    since="7.0.0",
    chips=chip.FROM_910B,
    unless=_unsuitable_for_gating,
    limits="no tokens, one expert by its sigmoid, groups of 2 or fewer experts, over "
    f"{_MOST_EXPERTS} experts, groups ranked by more than two experts or by two logits",
    bound=_BOUND,
    note="the derivative is ours: Ascend's is for sigmoids only, and came with 26.1",
)
def topk_routing(
    logits: Tensor,
    topk: int,
    score_function: str = "softmax",
    pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax over the chosen is softmax over all, divided by the sum of the chosen."""
    settings = dict(
        k_group=group_topk or 1,
        group_count=num_groups or 1,
        group_select_mode=int(group_topk is not None and topk // group_topk == 2),
        norm_type=_SIGMOID if score_function == "sigmoid" else _SOFTMAX,
    )
    divided = score_function == "softmax" and not pre_softmax
    factor = 1.0 if scaling_factor is None else scaling_factor
    wide = logits.float()
    bias = None if expert_bias is None else expert_bias.float()
    weights, experts = _Gate.apply(wide, bias, topk, settings, divided, factor)
    return weights.to(logits.dtype), experts


class _Gate(torch.autograd.Function):
    """Differentiated by hand, on the chosen scores where these are enough."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        bias: Tensor | None,
        topk: int,
        settings: dict[str, int],
        divided: bool,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.sigmoid, ctx.divided, ctx.factor = settings["norm_type"] == _SIGMOID, divided, factor
        weights, experts, scores = torch.ops.npu.npu_moe_gating_top_k(
            logits,
            topk,
            bias=bias,
            **settings,
            out_flag=not divided,
            routed_scaling_factor=1.0 if divided else factor,
            eps=SCORE_SUM_EPSILON,
        )
        experts = experts.long()
        ctx.mark_non_differentiable(experts)
        if divided:
            weights = weights / weights.sum(-1, keepdim=True)
            ctx.save_for_backward(experts, weights)
            ctx.shape = logits.shape
            return weights * factor, experts
        ctx.save_for_backward(experts, scores)
        return weights, experts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        experts, scores = ctx.saved_tensors
        grad = grad * ctx.factor
        if ctx.divided:
            kept = _through_softmax(grad, scores)
            grad_logits = kept.new_zeros(ctx.shape).scatter_(-1, experts, kept)
        elif ctx.sigmoid:
            chosen = scores.gather(-1, experts)
            total = chosen.sum(-1, keepdim=True) + SCORE_SUM_EPSILON
            kept = (grad - (grad * chosen / total).sum(-1, keepdim=True)) / total
            kept = kept * chosen * (1.0 - chosen)
            grad_logits = torch.zeros_like(scores).scatter_(-1, experts, kept)
        else:
            grad_logits = _through_softmax(torch.zeros_like(scores).scatter_(-1, experts, grad), scores)
        return grad_logits, None, None, None, None, None


def _through_softmax(grad: Tensor, probs: Tensor) -> Tensor:
    return probs * (grad - (grad * probs).sum(-1, keepdim=True))


def _unsuitable_for_permutation(
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
    "megatron.core.fusions.experts.permute_tokens",
    operators=("npu_moe_token_permute_with_routing_map",),
    since="7.2.0",
    chips=chip.FROM_910B,
    unless=_unsuitable_for_permutation,
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
    "megatron.core.fusions.experts.unpermute_tokens",
    operators=("npu_moe_token_unpermute_with_routing_map", "npu_moe_token_permute_with_routing_map"),
    since="7.2.0",
    chips=chip.FROM_910B,
    unless=lambda rows, where, routing_map, probs, topk, capacity: _unsuitable_for_permutation(
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
    operator's own derivative keeps until then, need not be kept.
    """

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
