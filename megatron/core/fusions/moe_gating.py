"""Which experts a token goes to, and with what weights."""

import torch
from torch import Tensor

from megatron.core.errors import ConfigError
from megatron.core.overrides import overridable

# Added to the sum of sigmoid scores before it divides them.
SCORE_SUM_EPSILON = 1e-20


@overridable
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
    """The best ``topk`` experts of every token.

    Args:
        logits: [t, E].
        topk: experts a token.
        score_function: ``softmax``: weights are the softmax over the chosen logits; ``sigmoid``: weights are
            the sigmoids of the chosen logits, divided by their sum if ``topk`` > 1 (DeepSeek-V3).
        pre_softmax: weights are chosen from the softmax over all experts, and do not add up to 1.
        num_groups: experts form so many groups of equal size, side by side ...
        group_topk: ... and the choice is within the best of them: those with the largest sums of their best
            ``topk // group_topk`` experts.
        scaling_factor: multiplies the weights.
        expert_bias: [E] fp32, added to sigmoid scores for the choice only.

    Returns:
        [t, topk] weights in the dtype of the logits, computed in fp32 at least; [t, topk] experts.

    Raises:
        ConfigError: settings that do not fit each other.
    """
    _check(logits.shape[-1], topk, score_function, num_groups, group_topk, expert_bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.sigmoid() if score_function == "sigmoid" else wide.softmax(-1) if pre_softmax else wide
    ranked = scores.detach() if expert_bias is None else scores.detach() + expert_bias
    if num_groups is not None and group_topk is not None:
        ranked = _within_best_groups(ranked, num_groups, group_topk, topk // group_topk)
    experts = ranked.topk(topk, dim=-1).indices
    weights = scores.gather(-1, experts)
    if score_function == "sigmoid":
        if topk > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + SCORE_SUM_EPSILON)
    elif not pre_softmax:
        weights = weights.softmax(-1)
    if scaling_factor is not None:
        weights = weights * scaling_factor
    return weights.to(logits.dtype), experts


def _within_best_groups(scores: Tensor, num_groups: int, group_topk: int, best: int) -> Tensor:
    """-inf for experts outside the ``group_topk`` groups of which the ``best`` experts sum up highest."""
    groups = scores.unflatten(-1, (num_groups, -1))  # [t, E] -> [t, groups, E/groups]
    chosen = groups.topk(best, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
    outside = torch.ones(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(
        -1, chosen, False
    )
    return groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


def _check(
    experts: int,
    topk: int,
    score_function: str,
    num_groups: int | None,
    group_topk: int | None,
    expert_bias: Tensor | None,
) -> None:
    if score_function not in ("softmax", "sigmoid"):
        raise ConfigError(f"router score function {score_function!r}: use softmax or sigmoid")
    if expert_bias is not None and score_function != "sigmoid":
        raise ConfigError(
            "an expert bias goes with sigmoid scores: set the router's score function to sigmoid"
        )
    if not 1 <= topk <= experts:
        raise ConfigError(f"router top-k {topk} of {experts} experts: choose 1 to {experts}")
    if (num_groups is None) != (group_topk is None):
        raise ConfigError(
            f"router groups {num_groups}, groups kept {group_topk}: give both numbers, or neither"
        )
    if num_groups is None or group_topk is None:
        return
    size = experts // num_groups
    fits = group_topk <= topk <= group_topk * size and group_topk <= num_groups
    if experts % num_groups or group_topk < 1 or not fits:
        raise ConfigError(
            f"{group_topk} of {num_groups} groups of {experts} experts for a top-k of {topk}: groups have "
            "one size, and no more of them are kept than the top-k, with no fewer experts"
        )
