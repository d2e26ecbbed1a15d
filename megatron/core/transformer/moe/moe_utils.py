"""Formulas of routing: auxiliary losses, capacities, and what a bias learns from the loads.

Letters: t tokens of this rank, T tokens of all ranks that share the sequences, E experts, k experts a token.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.collectives import all_reduce, group_size
from megatron.core.errors import ConfigError
from megatron.core.fusions.experts import limit_to_best_groups as _limit_to_best_groups
from megatron.core.fusions.experts import permute_tokens, topk_routing, unpermute_tokens
from megatron.core.transformer.moe.tracker import (  # noqa: F401  (importable from here)
    clear_aux_losses_tracker,
    reduce_aux_losses_tracker_across_ranks,
    save_to_aux_losses_tracker,
    track_moe_metrics,
)

SINKHORN_EPSILON = 1e-8
# It converges in a few dozen; nothing does where a logit is not a number.
SINKHORN_MOST_TURNS = 1000


def switch_load_balancing_loss_func(
    probs: Tensor,
    tokens_per_expert: Tensor,
    topk: int,
    moe_aux_loss_coeff: float,
    sequence_partition_group: ProcessGroup | None = None,
) -> Tensor:
    """``coeff * E / (T^2 k) * sum_e (sum_t p_te) n_e`` (Fedus et al., 2021, equation 4, for k experts).

    Args:
        probs: [t, E] scores over all experts.
        tokens_per_expert: [E] tokens that chose each expert.
        topk: experts a token.
        moe_aux_loss_coeff: weight.
        sequence_partition_group: ranks that share the sequences: n and T are theirs together, and their
            losses add up to the loss.
    """
    tokens = probs.shape[0] * group_size(sequence_partition_group)
    counts = tokens_per_expert.to(probs.dtype, copy=True)
    all_reduce(counts, sequence_partition_group)
    factor = moe_aux_loss_coeff * probs.shape[1] / (tokens * tokens * topk)
    return (probs.sum(0) * counts).sum() * factor


def sequence_load_balancing_loss_func(
    probs: Tensor,
    routing_map: Tensor,
    batch_size: int,
    seq_length: int,
    topk: int,
    moe_aux_loss_coeff: float,
    sequence_partition_group: ProcessGroup | None = None,
) -> Tensor:
    """The mean over sequences of ``coeff * sum_e (n_e E / (S k)) (mean_s p_se)`` (DeepSeek-V3, equation 17).

    Args:
        probs: [t, E] scores over all experts; tokens of one position stand side by side.
        routing_map: [t, E] bool.
        batch_size, seq_length: of this rank's tokens.
        topk: experts a token.
        moe_aux_loss_coeff: weight.
        sequence_partition_group: ranks that share the sequences: n and S are theirs together, and their
            losses add up to the loss.
    """
    length = seq_length * group_size(sequence_partition_group)
    # [s * b, E] -> [b, E]
    counts = routing_map.view(seq_length, batch_size, -1).sum(0).to(probs.dtype)
    all_reduce(counts, sequence_partition_group)
    means = probs.view(seq_length, batch_size, -1).sum(0) / length
    load = counts * (probs.shape[-1] / (length * topk))
    return (load * means).sum(-1).mean() * moe_aux_loss_coeff


def group_balance_losses(
    probs: Tensor,
    routing_map: Tensor,
    batch_size: int,
    seq_length: int,
    topk: int,
    num_groups: int,
    group_topk: int,
    sequence_partition_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Losses on the load of groups, and on the traffic to them (DeepSeek-V2, equations 26 and 29).

    With P_g the mean over a sequence of the scores within group g: the mean over sequences of
    ``sum_g f_g P_g``, f_g the mean of n_e E / (S k) within the group; and that of ``sum_g c_g P_g``, c_g the
    tokens with an expert in the group times num_groups / (S group_topk).

    Args:
        probs, routing_map, batch_size, seq_length, topk, sequence_partition_group: as of
            :func:`sequence_load_balancing_loss_func`.
        num_groups: groups of experts.
        group_topk: groups that a token may use.
    """
    length = seq_length * group_size(sequence_partition_group)
    # [s * b, E] -> [s, b, groups, E / groups]
    shape = (seq_length, batch_size, num_groups, -1)
    chosen = routing_map.view(shape)
    loads = torch.stack((chosen.sum(0).sum(-1), chosen.any(-1).sum(0))).to(probs.dtype)  # [2, b, groups]
    all_reduce(loads, sequence_partition_group)
    means = probs.view(shape).sum((0, 3)) / length  # [b, groups]
    # The mean over E / groups experts of n E / (S k) is the group's count times groups / (S k).
    device, communication = (
        (load * means).sum(-1).mean() * num_groups / (length * share)
        for load, share in zip(loads, (topk, group_topk), strict=True)
    )
    return device, communication


def z_loss_func(logits: Tensor, z_loss_coeff: float) -> Tensor:
    """``coeff * mean_t (ln sum_e exp z_te)^2`` (Zoph et al., 2022, equation 5).  logits: [t, E]"""
    return torch.logsumexp(logits, dim=-1).square().mean() * z_loss_coeff


def sinkhorn(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """exp(cost) with rows that sum to 1/t and columns that sum to 1/E, nearly.

    Rows and columns are rescaled in turn until the factors of the columns change by ``tol`` at most, on
    average.  [t, E] -> [t, E], fp32
    """
    wide = cost.float()
    # A factor of a whole row changes nothing, and no element overflows.
    weights = (wide - wide.amax(1, keepdim=True)).exp()
    rows, columns = weights.new_ones(weights.shape[0]), weights.new_ones(weights.shape[1])
    for _ in range(SINKHORN_MOST_TURNS):
        rows = 1.0 / (len(rows) * (weights @ columns + SINKHORN_EPSILON))
        before, columns = columns, 1.0 / (len(columns) * (rows @ weights + SINKHORN_EPSILON))
        if not (columns - before).abs().mean() > tol:
            break
    return rows.unsqueeze(1) * weights * columns


def get_capacity(
    num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int | None = None
) -> int:
    """Rows that an expert takes: its even share of ``num_tokens`` copies times the factor, rounded up."""
    capacity = math.ceil(num_tokens / num_experts * capacity_factor)
    return capacity if min_capacity is None else max(capacity, min_capacity)


def rows_per_expert(num_tokens: int, topk: int, num_experts: int, capacity_factor: float) -> int:
    """Capacity of every expert for ``num_tokens`` tokens, of which it can take each only once."""
    return min(get_capacity(num_tokens * topk, num_experts, capacity_factor), num_tokens)


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """Hands on a tensor, and lets the gradient of an auxiliary loss start where its own gradient passes.

    Attributes:
        main_loss_backward_scale: that gradient: what the main loss is multiplied by before backward.
    """

    main_loss_backward_scale: Tensor = torch.tensor(1.0)

    @staticmethod
    def forward(ctx: Any, output: Tensor, aux_loss: Tensor) -> Tensor:
        ctx.save_for_backward(aux_loss)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        (aux_loss,) = ctx.saved_tensors
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale.to(aux_loss.device, aux_loss.dtype)
        return grad_output, scale.expand_as(aux_loss)

    @staticmethod
    def set_loss_scale(scale: Tensor) -> None:
        """The gradient of every auxiliary loss from now on."""
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale


def dense(weights: Tensor, experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """[t, k] weights and experts -> [t, E] weights, 0 elsewhere, and bool map."""
    empty = weights.new_zeros(weights.shape[0], num_experts)
    return (
        empty.scatter(1, experts, weights),
        torch.zeros_like(empty, dtype=torch.bool).scatter_(1, experts, True),
    )


def with_capacity(
    probs: Tensor,
    routing_map: Tensor,
    topk: int,
    capacity_factor: float | None,
    pad_to_capacity: bool,
    drop_policy: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Lets each expert take no more tokens than its capacity; the rest are dropped.

    Args:
        probs, routing_map: [t, E] weights and choice.
        topk: experts a token.
        capacity_factor: capacity over an even share; None takes all.
        pad_to_capacity: give every expert as many rows: others with weight 0 where tokens are missing.
        drop_policy: ``probs`` keeps the largest weights of an expert, ``position`` its first tokens.

    Returns:
        [t, E] weights, 0 outside the map; [t, E] bool map; [E] tokens that chose each expert.
    """
    wanted = routing_map.sum(0)
    if capacity_factor is None:
        return probs, routing_map, wanted
    tokens, experts = routing_map.shape
    capacity = rows_per_expert(tokens, topk, experts, capacity_factor)
    if drop_policy == "probs":
        # Tokens that did not choose the expert come last, whatever their weight.
        order = probs.detach().masked_fill(~routing_map, -torch.inf)
    elif drop_policy == "position":
        places = torch.arange(tokens, device=probs.device, dtype=torch.float32).unsqueeze(1)
        order = torch.where(routing_map, -places, -places - tokens)
    else:
        raise ConfigError(f"token drop policy {drop_policy!r}: use probs or position")
    taken = torch.zeros_like(routing_map).scatter_(0, order.topk(capacity, dim=0).indices, True)
    kept = taken if pad_to_capacity else taken & routing_map
    return probs * kept, kept, wanted


def get_updated_expert_bias(
    tokens_per_expert: Tensor, expert_bias: Tensor, expert_bias_update_rate: float
) -> Tensor:
    """``bias + rate * sign(mean load - load)``, loads over all ranks with the layer (DeepSeek-V3, 2.1.2).

    Args:
        tokens_per_expert: [..., E] loads of this rank.
        expert_bias: of the same shape.
        expert_bias_update_rate: step.
    """
    with torch.no_grad():
        load = tokens_per_expert.clone()
        if parallel_state.model_parallel_is_initialized():
            all_reduce(load, parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        return expert_bias + expert_bias_update_rate * torch.sign(load.mean(-1, keepdim=True) - load)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def topk_softmax_with_capacity(
    logits: Tensor,
    topk: int,
    capacity_factor: float | None = None,
    pad_to_capacity: bool = False,
    drop_policy: str = "probs",
    use_pre_softmax: bool = False,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float | None = None,
    deterministic_mode: bool = False,
    score_function: str = "softmax",
    expert_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts of every token, of which each expert takes no more than its capacity.

    Args:
        logits: [t, E].
        topk, use_pre_softmax, num_groups, group_topk, scaling_factor, score_function, expert_bias: see
            :func:`megatron.core.fusions.experts.topk_routing`.
        capacity_factor: capacity over an even share; None takes all.
        pad_to_capacity: give every expert as many rows: others with weight 0 where tokens are missing.
        drop_policy: ``probs`` keeps the largest weights of an expert, ``position`` its first tokens.
        deterministic_mode: without meaning; results are the same in every run.

    Returns:
        [t, E] weights, 0 outside the map; [t, E] bool map; [E] tokens that chose each expert, before any
        was dropped.
    """
    weights, experts = topk_routing(
        logits,
        topk,
        score_function=score_function,
        pre_softmax=use_pre_softmax,
        num_groups=num_groups,
        group_topk=group_topk,
        scaling_factor=scaling_factor,
        expert_bias=expert_bias,
    )
    return with_capacity(
        *dense(weights, experts, logits.shape[-1]), topk, capacity_factor, pad_to_capacity, drop_policy
    )


def group_limited_topk(
    scores: Tensor, topk: int, num_tokens: int, num_experts: int, num_groups: int, group_topk: int
) -> tuple[Tensor, Tensor]:
    """The best ``topk`` experts within the best groups: 2 x [num_tokens, topk], scores and experts."""
    limited = _limit_to_best_groups(
        scores.view(num_tokens, num_experts), num_groups, group_topk, topk // group_topk
    )
    experts = limited.topk(topk, dim=-1).indices
    return scores.gather(1, experts), experts


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A row for every token and expert that belong together, in the order of the experts.

    Args:
        tokens: [t, h].
        routing_map: [t, E] bool.
        probs: [t, E] weights to arrange alike.
        num_out_tokens: number of rows; with ``drop_and_pad`` E times the rows of each expert.
        fused: without meaning: there is one implementation.
        drop_and_pad: every expert has as many tokens.

    Returns:
        [r, h] rows, [r] weights or None, [r] the token of each row.
    """
    capacity = num_out_tokens // routing_map.shape[1] if drop_and_pad and num_out_tokens else None
    rows, row_probs, _ = permute_tokens(tokens, routing_map, probs, None, capacity)
    pairs = routing_map.t().nonzero()
    if capacity is not None:
        # The first tokens of each expert, as permute_tokens takes them.
        kept = routing_map & (routing_map.cumsum(0) <= capacity)
        pairs = kept.t().nonzero()
    return rows, row_probs, pairs[:, 1]


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: torch.Size,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> Tensor:
    """Sums rows of :func:`permute` by the tokens that they came from.

    Args:
        permuted_tokens: [r, h].
        sorted_indices: [r] the token of each row.
        restore_shape: (t, h).
        probs: [t, E] weights of the rows; they need ``routing_map``.
        routing_map: [t, E] bool, as it was given to ``permute``.
        fused, drop_and_pad: as there.
    """
    if probs is not None:
        if routing_map is None:
            raise ConfigError("unpermute: probs need the routing_map that the tokens were permuted by")
        capacity = len(permuted_tokens) // routing_map.shape[1] if drop_and_pad else None
        where = sorted_indices
        return unpermute_tokens(permuted_tokens, where, routing_map, probs, None, capacity)
    empty = permuted_tokens.new_zeros(tuple(restore_shape))
    return empty.index_add(0, sorted_indices, permuted_tokens)


def sort_chunks_by_idxs(
    input: Tensor,
    split_sizes: Tensor,
    sorted_idxs: Tensor,
    probs: Tensor | None = None,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rows, cut into chunks of the given lengths, with the chunks in another order; weights alike."""
    sizes, order = split_sizes.tolist(), sorted_idxs.tolist()
    chunks = input.split(sizes)
    output = torch.cat([chunks[number] for number in order])
    if probs is None:
        return output, None
    parts = probs.split(sizes)
    return output, torch.cat([parts[number] for number in order])


def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """A tensor on the host, as an array if asked; anything else as it is."""
    if not isinstance(tensor, Tensor):
        return tensor
    on_host = tensor.cpu()
    return on_host.numpy() if as_numpy else on_host
