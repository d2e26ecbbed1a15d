"""The experts of each token and their weights; copies of tokens in the order of their experts, and back.

Letters: t tokens, E experts, r rows (copies of tokens), h hidden. Matmuls of experts are in ``matmul``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import accelerator
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
    _check_routing(logits.shape[-1], topk, score_function, num_groups, group_topk, expert_bias)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.sigmoid() if score_function == "sigmoid" else wide.softmax(-1) if pre_softmax else wide
    ranked = scores.detach() if expert_bias is None else scores.detach() + expert_bias
    if num_groups is not None and group_topk is not None:
        ranked = limit_to_best_groups(ranked, num_groups, group_topk, topk // group_topk)
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


def limit_to_best_groups(scores: Tensor, num_groups: int, group_topk: int, best: int) -> Tensor:
    """-inf for experts outside the ``group_topk`` groups of which the ``best`` experts sum up highest."""
    groups = scores.unflatten(-1, (num_groups, -1))  # [t, E] -> [t, groups, E/groups]
    chosen = groups.topk(best, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
    outside = torch.ones(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(
        -1, chosen, False
    )
    return groups.masked_fill(outside.unsqueeze(-1), -torch.inf).flatten(-2)


def _check_routing(
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


@overridable
def permute_tokens(
    tokens: Tensor, routing_map: Tensor, probs: Tensor | None, topk: int | None, capacity: int | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A row for every token and expert that belong together: expert 0's tokens first, each in their order.

    Args:
        tokens: [t, h].
        routing_map: [t, E] bool, True where a token goes to an expert.
        probs: [t, E] weights to arrange alike.
        topk: experts of every token, if all have as many; None if they differ, which makes the host wait
            for the number of rows.
        capacity: rows of every expert, if all have as many: the first tokens routed to it. None otherwise.
            At most one of ``topk`` and ``capacity`` is given.

    Returns:
        [r, h] rows; [r] weights of the rows or None; where they are. That is for ``unpermute_tokens``: with
        ``topk`` the row of each choice, [t * topk], token by token with ascending experts; else the token of
        each row, [r].

    Raises:
        ConfigError: a map that ``topk`` or ``capacity`` is not true of (found on a CPU only, where looking
            is free).
    """
    _check_permutation(routing_map, topk, capacity)
    count = _row_count(routing_map, topk, capacity)
    place = _row_of_each_pair(routing_map, capacity, count)
    row_probs = None if probs is None else _by_row(probs, place, count)
    if topk is None:
        ids = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
        where = _by_row(ids.expand_as(place), place, count)
    else:
        where = _row_of_each_choice(routing_map, place, topk)
    return _Spread.apply(tokens, where, routing_map, topk, capacity), row_probs, where


@overridable
def unpermute_tokens(
    rows: Tensor,
    where: Tensor,
    routing_map: Tensor,
    probs: Tensor | None,
    topk: int | None,
    capacity: int | None,
) -> Tensor:
    """The sum of each token's rows, weighted by ``probs`` if there are any.

    Args:
        rows: [r, h], ordered by ``permute_tokens``.
        where: its last result, from the same ``topk`` and ``capacity``.
        routing_map: [t, E] bool, as it was there.
        probs: [t, E] weights, of the dtype of ``rows`` or wider; products and sums are as wide.

    Returns:
        [t, h] in the dtype of ``rows``, rounded once.
    """
    weighted = rows
    if probs is not None:
        place = _row_of_each_pair(routing_map, capacity, len(rows))
        weighted = rows * _by_row(probs, place, len(rows)).unsqueeze(1)
    return _Collect.apply(weighted, where, routing_map, topk, capacity).to(rows.dtype)


def _row_count(routing_map: Tensor, topk: int | None, capacity: int | None) -> int:
    tokens, experts = routing_map.shape
    if capacity is not None:
        return experts * capacity
    return int(routing_map.sum()) if topk is None else tokens * topk


def _row_of_each_pair(routing_map: Tensor, capacity: int | None, count: int) -> Tensor:
    """[t, E]: row of a token's copy for an expert; ``count``, the number of rows, where there is none.

    Made of prefix sums, so that no shape depends on what the map holds.
    """
    tokens, experts = routing_map.shape
    if capacity is None:
        # [t, E] -> [E * t], counted through -> [t, E]
        place = routing_map.t().reshape(-1).cumsum(0).view(experts, tokens).t() - 1
        kept = routing_map
    else:
        rank = routing_map.cumsum(0) - 1
        place = rank + capacity * torch.arange(experts, device=rank.device)
        kept = routing_map & (rank < capacity)
    return place.masked_fill(~kept, count)


def _by_row(values: Tensor, place: Tensor, count: int) -> Tensor:
    """[t, E] values -> [count]; what has no row goes to a last one that is cut off."""
    rows = values.new_zeros(count + 1).scatter(0, place.reshape(-1), values.reshape(-1))
    return rows[:count]


def _row_of_each_choice(routing_map: Tensor, place: Tensor, topk: int) -> Tensor:
    """[t, E] -> [t * topk], for each token the rows of its experts."""
    choice = (routing_map.cumsum(1) - 1).masked_fill(~routing_map, topk)
    rows = place.new_empty(len(place), topk + 1).scatter_(1, choice, place)
    return rows[:, :topk].reshape(-1)


def _token_of_each_row(where: Tensor, topk: int | None) -> Tensor:
    if topk is None:
        return where
    ids = torch.arange(len(where), device=where.device) // topk
    return torch.empty_like(ids).scatter_(0, where.long(), ids)


def _sum_of_rows(
    rows: Tensor, where: Tensor, routing_map: Tensor, topk: int | None, capacity: int | None
) -> Tensor:
    """[r, h] -> [t, h], without a copy of the rows and with one rounding, the same in every run."""
    if topk is not None:
        return F.embedding_bag(where.view(-1, topk), rows, mode="sum")
    count = len(rows)
    place = _row_of_each_pair(routing_map, capacity, count)
    kept = place < count
    # Rows token by token: a sort of integers, which not every device has, is a prefix sum here.
    turn = (kept.reshape(-1).cumsum(0).view_as(place) - 1).masked_fill(~kept, count)
    per_token = kept.sum(1)
    return F.embedding_bag(_by_row(place, turn, count), rows, per_token.cumsum(0) - per_token, mode="sum")


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        where: Tensor,
        routing_map: Tensor,
        topk: int | None,
        capacity: int | None,
    ) -> Tensor:
        ctx.save_for_backward(where, routing_map)
        ctx.topk, ctx.capacity = topk, capacity
        return tokens.index_select(0, _token_of_each_row(where, topk))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        where, routing_map = ctx.saved_tensors
        grad_tokens = _sum_of_rows(grad.contiguous(), where, routing_map, ctx.topk, ctx.capacity)
        return grad_tokens, None, None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, where: Tensor, routing_map: Tensor, topk: int | None, capacity: int | None
    ) -> Tensor:
        ctx.save_for_backward(where)
        ctx.topk = topk
        return _sum_of_rows(rows, where, routing_map, topk, capacity)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (where,) = ctx.saved_tensors
        grad_rows = grad.index_select(0, _token_of_each_row(where, ctx.topk))
        return grad_rows, None, None, None, None


def _check_permutation(routing_map: Tensor, topk: int | None, capacity: int | None) -> None:
    if topk is not None and capacity is not None:
        raise ConfigError("tokens are permuted with a topk or with a capacity: leave one of them None")
    if routing_map.device.type != accelerator.CPU:
        return
    if topk is not None and not bool((routing_map.sum(1) == topk).all()):
        raise ConfigError(
            f"topk {topk} was promised, but some tokens of the routing map have another number of experts: "
            "give topk=None"
        )
    if capacity is not None and not bool((routing_map.sum(0) >= capacity).all()):
        raise ConfigError(
            f"capacity {capacity} was promised, but some experts of the routing map have fewer tokens: pad "
            "the map to the capacity, or give capacity=None"
        )
