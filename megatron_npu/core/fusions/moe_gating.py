"""Which experts a token goes to, and with what weights."""

from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.moe_gating import SCORE_SUM_EPSILON
from megatron_npu import chip
from megatron_npu.registry import replaces

_MOST_EXPERTS = 2048
_GROUP_ALIGNMENT = 32
_SOFTMAX, _SIGMOID = 0, 1


def _unsuitable(
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
    "megatron.core.fusions.moe_gating.topk_routing",
    operators=("npu_moe_gating_top_k",),
    since="7.0.0",
    chips=chip.FROM_910B,
    unless=_unsuitable,
    limits="no tokens, one expert by its sigmoid, groups of 2 or fewer experts, over "
    f"{_MOST_EXPERTS} experts, groups ranked by more than two experts or by two logits",
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
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
