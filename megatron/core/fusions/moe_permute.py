"""Copies of tokens in the order of their experts, and back.

Letters: t tokens, E experts, r rows (copies of tokens), h hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import accelerator
from megatron.core.errors import ConfigError
from megatron.core.overrides import overridable


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
    _check(routing_map, topk, capacity)
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
        grad_tokens = _sum_of_rows(grad.contiguous(), *ctx.saved_tensors, ctx.topk, ctx.capacity)
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
        grad_rows = grad.index_select(0, _token_of_each_row(*ctx.saved_tensors, ctx.topk))
        return grad_rows, None, None, None, None


def _check(routing_map: Tensor, topk: int | None, capacity: int | None) -> None:
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
