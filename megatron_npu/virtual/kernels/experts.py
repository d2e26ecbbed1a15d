"""Routing of tokens to experts, their order by expert, and the experts' products."""

import math
from typing import Any

import torch
from torch import Tensor

from megatron_npu.virtual.kernels import kernel

_MOST_INDICES = 16_777_215


# --- which experts ------------------------------------------------------------------------------------------


@kernel("npu_moe_gating_top_k")
def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token by token, and expert by expert: nothing here is vectorised."""
    assert input_ids is None and tid2eid is None and renorm == 0 and x.dim() == 2
    count, experts = x.shape
    assert count and experts <= 2048 and experts % group_count == 0
    size = experts // group_count
    assert size > 2 and math.ceil(size / 32) * 32 * group_count <= 2048
    assert 1 <= k_group <= group_count and 1 <= k <= size * k_group
    assert bias is None or (bias.shape == (experts,) and bias.dtype == x.dtype)
    y, chosen = torch.empty(count, k), torch.empty(count, k, dtype=torch.int32)
    scores = torch.empty(count, experts)
    for token, logits in enumerate(x.double().tolist()):
        if norm_type == 1:
            row = [1 / (1 + math.exp(-logit)) for logit in logits]
        else:
            powers = [math.exp(logit - max(logits)) for logit in logits]
            row = [power / sum(powers) for power in powers]
        ranked = row if bias is None else [s + b for s, b in zip(row, bias.tolist(), strict=True)]
        groups = [sorted(ranked[g * size : (g + 1) * size], reverse=True) for g in range(group_count)]
        worth = [sum(group[: 1 + group_select_mode]) for group in groups]
        best = sorted(range(group_count), key=lambda g: -worth[g])[:k_group]
        allowed = [e for e in range(experts) if e // size in best]
        picked = sorted(allowed, key=lambda e: -ranked[e])[:k]
        total = sum(row[e] for e in picked) + eps if norm_type == 1 else 1.0
        y[token] = torch.tensor([row[e] / total * routed_scaling_factor for e in picked])
        chosen[token] = torch.tensor(picked, dtype=torch.int32)
        scores[token] = torch.tensor(row)
    return y.to(x.dtype), chosen, scores if out_flag else torch.full((count, experts), torch.nan)


# --- their order --------------------------------------------------------------------------------------------


def _pairs(routing_map: Tensor) -> list[tuple[int, int]]:
    """(token, expert) by expert, then by token."""
    tokens, experts = routing_map.shape
    on = routing_map.tolist()
    return [(t, e) for e in range(experts) for t in range(tokens) if on[t][e]]


def _padded_pairs(routing_map: Tensor, capacity: int) -> list[tuple[int, int]]:
    by_expert = [[pair for pair in _pairs(routing_map) if pair[1] == e] for e in range(routing_map.shape[1])]
    assert all(len(pairs) >= capacity for pairs in by_expert), "what fills an expert up is not documented"
    return [pair for pairs in by_expert for pair in pairs[:capacity]]


def _check_types(tokens: Tensor, probs: Tensor | None, routing_map: Tensor | None) -> None:
    assert routing_map is None or routing_map.dtype in (torch.bool, torch.int8)
    if probs is not None and probs.dtype != tokens.dtype:
        assert (tokens.dtype, probs.dtype) == (torch.bfloat16, torch.float32)


@kernel("npu_moe_token_permute_with_routing_map")
def permute_with_routing_map(
    tokens: Tensor,
    routing_map: Tensor,
    *,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    _check_types(tokens, probs, routing_map)
    count, experts = routing_map.shape
    wanted = count if num_out_tokens is None else num_out_tokens
    if drop_and_pad:
        pairs = _padded_pairs(routing_map, wanted // experts)
        indices = [t for t, _ in pairs]
    else:
        topk = wanted // count
        assert 0 < topk < 512 and topk * count < _MOST_INDICES
        assert bool((routing_map.sum(1) == topk).all()), "another number of experts than topk"
        pairs = _pairs(routing_map)
        # Position of each choice: the inverse of the order.
        indices = [place for _, place in sorted((pair, place) for place, pair in enumerate(pairs))]
    rows, columns = (torch.tensor(side) for side in zip(*pairs, strict=True))
    row_probs = None if probs is None else probs[rows, columns]
    return tokens[rows].clone(), row_probs, torch.tensor(indices, dtype=torch.int32)


@kernel("npu_moe_token_permute_with_routing_map_grad")
def permute_with_routing_map_grad(
    grad_rows: Tensor,
    grad_probs: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> tuple[Tensor, Tensor | None]:
    capacity = len(sorted_indices) // experts_num
    pairs = _padded_pairs(routing_map, capacity) if drop_and_pad else _pairs(routing_map)
    grad_tokens = torch.zeros(tokens_num, grad_rows.shape[1])
    grad_map = None if grad_probs is None else grad_probs.new_zeros(tokens_num, experts_num)
    for place, (token, expert) in enumerate(pairs):
        grad_tokens[token] += grad_rows[place].float()
        if grad_map is not None and grad_probs is not None:
            grad_map[token, expert] = grad_probs[place]
    return grad_tokens.to(grad_rows.dtype), grad_map


@kernel("npu_moe_token_unpermute_with_routing_map")
def unpermute_with_routing_map(*args: Any, **kwargs: Any) -> Tensor:
    return unpermute_for_the_derivative(*args, **kwargs)[0]


@kernel("_npu_moe_token_unpermute_with_routing_map")
def unpermute_for_the_derivative(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: list[int],
    *,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Where the rows are and whose they are: the derivative gets it back with padding, and without any gets
    the indices twice.
    """
    _check_types(permuted_tokens, probs, routing_map)
    assert sorted_indices.dtype == torch.int32 and (probs is None) == (routing_map is None)
    places, owners = _places_and_owners(sorted_indices, restore_shape[0], drop_and_pad)
    out = torch.zeros(restore_shape)
    weights = _weights_of_rows(probs, routing_map, sorted_indices, drop_and_pad)
    for place, owner in zip(places, owners, strict=True):
        if place < 0:
            continue  # documented as: no row
        row = permuted_tokens[place].float()
        out[owner] += row if weights is None else row * weights[place].float()
    where, whose = (torch.tensor(side, dtype=torch.int32) for side in (places, owners))
    return out.to(permuted_tokens.dtype), where, whose, weights


def _places_and_owners(sorted_indices: Tensor, tokens: int, padded: bool) -> tuple[list[int], list[int]]:
    indices = sorted_indices.tolist()
    if padded:
        assert all(0 <= token < tokens for token in indices)
        return list(range(len(indices))), indices
    topk = len(indices) // tokens
    assert 0 < topk <= 512 and topk * tokens == len(indices)
    return indices, [i // topk for i in range(len(indices))]


def _weights_of_rows(
    probs: Tensor | None, routing_map: Tensor | None, sorted_indices: Tensor, padded: bool
) -> Tensor | None:
    if probs is None:
        return None
    assert routing_map is not None
    if padded:
        pairs = _padded_pairs(routing_map, len(sorted_indices) // routing_map.shape[1])
    else:
        pairs = _pairs(routing_map)
    return torch.stack([probs[pair] for pair in pairs])


@kernel("npu_moe_token_unpermute_with_routing_map_grad")
def unpermute_with_routing_map_grad(
    grad: Tensor,
    out_index: Tensor,
    permuted_token_id: Tensor,
    routing_map: Tensor | None,
    permuted_tokens: Tensor | None,
    probs: Tensor | None,
    drop_and_pad: bool,
    restore_shape: list[int],
) -> tuple[Tensor, Tensor | None]:
    weights = _weights_of_rows(probs, routing_map, out_index, drop_and_pad)
    grad_rows = torch.full((len(out_index), grad.shape[1]), torch.nan)
    grad_weights = torch.zeros(len(out_index))
    places, owners = out_index.tolist(), permuted_token_id.tolist()
    if not drop_and_pad:
        assert places == owners
        places, owners = _places_and_owners(out_index, restore_shape[0], False)
    for place, owner in zip(places, owners, strict=True):
        arriving = grad[owner].float()
        grad_rows[place] = arriving if weights is None else arriving * weights[place].float()
        if weights is not None:
            assert permuted_tokens is not None
            grad_weights[place] = (arriving * permuted_tokens[place].float()).sum()
    if weights is None:
        return grad_rows.to(grad.dtype), None
    assert routing_map is not None and probs is not None
    capacity = len(out_index) // routing_map.shape[1]
    pairs = _padded_pairs(routing_map, capacity) if drop_and_pad else _pairs(routing_map)
    grad_probs = torch.zeros(routing_map.shape, dtype=probs.dtype)
    for place, pair in enumerate(pairs):
        grad_probs[pair] = grad_weights[place]
    return grad_rows.to(grad.dtype), grad_probs


# --- their products -----------------------------------------------------------------------------------------


def _groups(group_list: Tensor, total: int) -> list[slice]:
    assert group_list.dtype == torch.int64 and group_list.dim() == 1 and len(group_list) <= 1024
    ends = group_list.tolist()
    starts = [0, *ends[:-1]]
    assert all(a <= b for a, b in zip(starts, ends, strict=True)), "ends must not fall"
    assert ends[-1] == total, "the last end is not the number of rows"
    return [slice(a, b) for a, b in zip(starts, ends, strict=True)]


def _check_product(x: Tensor, weight: Tensor) -> None:
    assert x.dtype == weight.dtype and x.numel()
    sides = (x.shape[1] if x.is_contiguous() else x.shape[0], weight.shape[-1], weight.shape[-2])
    assert max(sides) < 65536


@kernel("npu_grouped_matmul")
def grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    **others: object,
) -> list[Tensor]:
    assert all(value in (None, 0) for value in others.values()), "only plain products"
    assert len(x) == len(weight) == 1 and split_item in (2, 3) and group_list_type == 0
    assert group_list is not None
    rows, matrix = x[0], weight[0]
    if group_type == 0:
        _check_product(rows, matrix)
        assert rows.is_contiguous() and matrix.dim() == 3 and len(group_list) == len(matrix)
        assert matrix.is_contiguous() or matrix.transpose(1, 2).is_contiguous()
        groups = _groups(group_list, len(rows))
        parts = [rows[g].double() @ matrix[e].double() for e, g in enumerate(groups)]
        return [torch.cat(parts).to(rows.dtype)]
    assert group_type == 2 and rows.t().is_contiguous() and matrix.is_contiguous()
    groups = _groups(group_list, len(matrix))
    out = torch.full((len(groups), rows.shape[0], matrix.shape[1]), torch.nan, dtype=rows.dtype)
    for e, group in enumerate(groups):
        if group.stop > group.start:  # what a group of nothing gives is not documented
            out[e] = (rows[:, group].double() @ matrix[group].double()).to(rows.dtype)
    return [out]


@kernel("npu_grouped_matmul_add_")
def grouped_matmul_add_(
    input: Tensor,
    x: Tensor,
    weight: Tensor,
    group_list: Tensor,
    *,
    transpose_x: bool = True,
    transpose_weight: bool = False,
    group_type: int = 2,
    group_list_type: int | None = 0,
) -> Tensor:
    assert transpose_x and not transpose_weight and group_type == 2 and group_list_type == 0
    assert input.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)
    _check_product(x, weight)
    for e, group in enumerate(_groups(group_list, len(x))):
        input[e] += (x[group].double().t() @ weight[group].double()).float()
    return input
