"""Sending tokens to the ranks that hold their experts, and the results back.

Letters: t tokens of this rank, E experts, e of them on this rank, r rows (copies of tokens) that this rank's
experts work on, h hidden. "Expert-parallel ranks" hold different experts; "expert tensor-parallel ranks" hold
parts of the same ones, so that each of them needs the rows of all, and has a partial sum of every result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import collectives, parallel_state
from megatron.core.collectives import group_rank, group_size
from megatron.core.errors import ConfigError, UsageError
from megatron.core.fusions.experts import permute_tokens, unpermute_tokens
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import rows_per_expert
from megatron.core.transformer.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP


class MoETokenDispatcher(ABC):
    """What a layer asks of a dispatcher: ``token_permutation``, then ``token_unpermutation``.

    Attributes:
        config: model config.
        shared_experts: shared experts that run while tokens travel, or None.
        tp_size: expert tensor-parallel size.
        ep_size: expert-parallel size.
    """

    def __init__(self, config: TransformerConfig):
        self.config = config
        self.shared_experts: SharedExpertMLP | None = None
        self.tp_size = config.expert_tensor_parallel_size or 1
        self.ep_size = config.expert_model_parallel_size

    @property
    def ep_group(self) -> ProcessGroup | None:
        """Ranks with different experts; None where there are no groups."""
        return parallel_state.get_expert_model_parallel_group(check_initialized=False)

    @property
    def tp_group(self) -> ProcessGroup | None:
        """Ranks with parts of the same experts."""
        return parallel_state.get_expert_tensor_parallel_group(check_initialized=False)

    @property
    def tp_rank(self) -> int:
        """Place among those."""
        return group_rank(self.tp_group)

    @property
    def tp_ep_group(self) -> ProcessGroup | None:
        """All ranks that share the experts of a layer; those with parts of the same ones are neighbours."""
        return parallel_state.get_expert_tensor_and_model_parallel_group(check_initialized=False)

    @abstractmethod
    def token_permutation(
        self, tokens: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Brings the rows of this rank's experts.

        Args:
            tokens: [s, b, h], t = s * b.
            probs: [t, E] routing weights.
            routing_map: [t, E] bool.

        Returns:
            [r, h] rows, the first expert's first; [e] rows of each expert; [r] routing weights.
        """

    @abstractmethod
    def token_unpermutation(
        self, expert_output: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sums each token's results, wherever they were computed.  [r, h] -> [s, b, h], and no bias."""

    def set_shared_experts(self, shared_experts: SharedExpertMLP) -> None:
        """Runs them while tokens travel, and adds their output to the tokens."""
        self.shared_experts = shared_experts

    def _experts_per_token(self) -> int | None:
        """The same number for every token, unless a capacity may take some away."""
        return self.config.moe_router_topk if self.config.moe_expert_capacity_factor is None else None

    def _rows_per_expert(self, tokens: int) -> int | None:
        """Rows of every expert among ``tokens``, where the router pads all experts to their capacity."""
        config = self.config
        if not config.moe_pad_expert_input_to_capacity:
            return None
        assert config.num_moe_experts is not None and config.moe_expert_capacity_factor is not None
        return rows_per_expert(
            tokens, config.moe_router_topk, config.num_moe_experts, config.moe_expert_capacity_factor
        )


@dataclass(frozen=True)
class _Permutation:
    """How ``permute_tokens`` was called, for the way back."""

    shape: torch.Size
    where: Tensor
    routing_map: Tensor
    topk: int | None
    capacity: int | None

    def undo(self, rows: Tensor) -> Tensor:
        """[r, h] -> [t, h], sums of the rows of each token"""
        return unpermute_tokens(rows, self.where, self.routing_map, None, self.topk, self.capacity)


def _no_bias(bias: Tensor | None) -> None:
    if bias is not None:
        raise ConfigError("experts have no biases: set add_bias_linear to False")


class MoEAllGatherTokenDispatcher(MoETokenDispatcher):
    """Gathers all ranks' tokens, keeps the rows of this rank's experts, and sums the results over ranks.

    Simple, and cheap for few ranks: what travels grows with the number of ranks, not with that of experts
    per token.

    Args:
        num_local_experts: e.
        local_expert_indices: their numbers among all experts.
        config: model config.
    """

    def __init__(self, num_local_experts: int, local_expert_indices: list[int], config: TransformerConfig):
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self._sent: _Permutation | None = None

    def token_permutation(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        ranks, topk = group_size(self.tp_ep_group), self._experts_per_token()
        capacity = self._rows_per_expert(len(tokens))
        if ranks > 1:
            # [t, ...] -> [ranks * t, ...]
            tokens, probs, routing_map = (
                gather_from_sequence_parallel_region(each, group=self.tp_ep_group)
                for each in (tokens, probs, routing_map)
            )
            capacity = None if capacity is None else capacity * ranks
            if self.ep_size > 1:
                topk = None
                first = self.local_expert_indices[0]
                mine = slice(first, first + self.num_local_experts)
                probs, routing_map = probs[:, mine], routing_map[:, mine].contiguous()
        rows, row_probs, where = permute_tokens(tokens, routing_map, probs, topk, capacity)
        assert row_probs is not None, "there were weights"
        self._sent = _Permutation(hidden_states.shape, where, routing_map, topk, capacity)
        return rows, routing_map.sum(0), row_probs

    def token_unpermutation(
        self, hidden_states: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        _no_bias(bias)
        if self._sent is None:
            raise UsageError("token_unpermutation() takes back what token_permutation() gave: call it first")
        sent, self._sent = self._sent, None
        tokens = sent.undo(hidden_states)
        if group_size(self.tp_ep_group) > 1:
            # [ranks * t, h] -> [t, h]
            tokens = reduce_scatter_to_sequence_parallel_region(tokens, self.tp_ep_group)
        return tokens.view(sent.shape), None


@dataclass(frozen=True)
class _Exchange:
    """Sizes of one exchange of rows.

    Attributes:
        permutation: of this rank's own tokens.
        to_ranks, from_ranks: rows for and from every expert-parallel rank; None if all are equal.
        of_parts: rows of every expert tensor-parallel rank, once it has received its own.
        chunks: rows of each (expert tensor-parallel rank, expert-parallel rank, local expert), in the order
            of arrival.
    """

    permutation: _Permutation
    to_ranks: list[int]
    from_ranks: list[int]
    of_parts: list[int]
    chunks: list[int]


class MoEAlltoAllTokenDispatcher(MoETokenDispatcher):
    """Sends every row to the rank of its expert, and the result back.

    Ranks that hold parts of the same experts then share their rows. What travels grows with the number of
    experts per token. The host waits for the numbers of rows once, unless every expert has its capacity.

    Args:
        num_local_experts: e.
        local_expert_indices: their numbers among all experts.
        config: model config.
    """

    def __init__(self, num_local_experts: int, local_expert_indices: list[int], config: TransformerConfig):
        super().__init__(config)
        assert config.num_moe_experts is not None, "a layer of experts has some"
        self.num_local_experts = num_local_experts
        self.num_experts = config.num_moe_experts
        self.local_expert_indices = local_expert_indices
        self.moe_expert_capacity_factor = config.moe_expert_capacity_factor
        self._counts: Tensor | None = None
        self._sent: _Exchange | None = None

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Rows of each of this rank's experts, [e], found out together with the other ranks.

        routing_map: [t, E] bool, of this rank's tokens.
        """
        ranks, capacity = group_size(self.tp_ep_group), self._rows_per_expert(len(routing_map))
        if capacity is not None:
            # [expert-parallel rank, expert tensor-parallel rank, E]
            self._counts = torch.full((self.ep_size, self.tp_size, self.num_experts), capacity)
        elif ranks == 1:
            self._counts = None
            return routing_map.sum(0)
        else:
            mine = routing_map.sum(0)
            counts = mine.new_empty(ranks * self.num_experts)
            collectives.all_gather(counts, mine, self.tp_ep_group)
            self._counts = counts.cpu().view(self.ep_size, self.tp_size, self.num_experts)
        return self._counts[..., self._mine()].sum((0, 1))

    def _mine(self) -> slice:
        first = self.local_expert_indices[0]
        return slice(first, first + self.num_local_experts)

    def _plan(self, permutation: _Permutation) -> _Exchange:
        if self._counts is None:
            return _Exchange(permutation, [], [], [], [])
        here, part = group_rank(self.ep_group), self.tp_rank
        # [rank, expert of it] -> [rank]
        to_ranks = self._counts[here, part].view(self.ep_size, -1).sum(1)
        arriving = self._counts[..., self._mine()]
        return _Exchange(
            permutation,
            to_ranks.tolist(),
            arriving[:, part].sum(1).tolist(),
            arriving.sum((0, 2)).tolist(),
            arriving.transpose(0, 1).flatten().tolist(),
        )

    def token_permutation(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        topk, capacity = self._experts_per_token(), self._rows_per_expert(len(tokens))
        tokens_per_expert = self.preprocess(routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        rows, row_probs, where = permute_tokens(tokens, routing_map, probs, topk, capacity)
        assert row_probs is not None, "there were weights"
        permutation = _Permutation(hidden_states.shape, where, routing_map, topk, capacity)
        self._sent = sent = self._plan(permutation)
        rows, row_probs = self._bring(rows, sent), self._bring(row_probs, sent)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, tokens_per_expert, row_probs

    def _bring(self, x: Tensor, sent: _Exchange) -> Tensor:
        """Rows in the order of all experts -> rows of this rank's experts, expert by expert."""
        if self.ep_size > 1:
            x = all_to_all(self.ep_group, x, sent.from_ranks, sent.to_ranks)
        if self.tp_size > 1:
            x = gather_from_sequence_parallel_region(x, group=self.tp_group, output_split_sizes=sent.of_parts)
        return _by_columns(x, sent.chunks, self.num_local_experts)

    def token_unpermutation(
        self, hidden_states: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        _no_bias(bias)
        if self._sent is None:
            raise UsageError("token_unpermutation() takes back what token_permutation() gave: call it first")
        sent, self._sent = self._sent, None
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
        rows = _by_rows(hidden_states, sent.chunks, self.num_local_experts)
        if self.tp_size > 1:
            rows = reduce_scatter_to_sequence_parallel_region(
                rows, self.tp_group, input_split_sizes=sent.of_parts
            )
        if self.ep_size > 1:
            rows = all_to_all(self.ep_group, rows, sent.to_ranks, sent.from_ranks)
        if self.shared_experts is not None:
            self.shared_experts.post_forward_comm()
        output = sent.permutation.undo(rows).view(sent.permutation.shape)
        if self.shared_experts is not None:
            output = output + self.shared_experts.get_output()
        return output, None


def _by_columns(x: Tensor, sizes: list[int], columns: int) -> Tensor:
    """Chunks of rows that fill a table row by row, joined column by column.

    sizes: rows of each chunk, row by row of the table; columns: of the table. -> the same rows of ``x``.
    """
    if columns == 1 or len(sizes) <= columns:
        return x
    chunks = x.split(sizes)
    return torch.cat([chunk for column in range(columns) for chunk in chunks[column::columns]])


def _by_rows(x: Tensor, sizes: list[int], columns: int) -> Tensor:
    """What ``_by_columns`` joined, in the first order again."""
    if columns == 1 or len(sizes) <= columns:
        return x
    lines = len(sizes) // columns
    chunks = x.split([sizes[line * columns + column] for column in range(columns) for line in range(lines)])
    return torch.cat([chunk for line in range(lines) for chunk in chunks[line::lines]])


class MoEFlexTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """The dispatcher of ``flex``: where the original calls DeepEP kernels, tokens travel as with alltoall."""
