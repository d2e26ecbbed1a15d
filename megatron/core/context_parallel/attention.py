"""Choosing how the ranks that share a sequence exchange it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import accelerator, parallel_state
from megatron.core.context_parallel.gather import gather_attention
from megatron.core.context_parallel.heads import check_heads, from_heads, gather_mask, to_heads
from megatron.core.context_parallel.partial import SplitAttention, mixed_seed
from megatron.core.context_parallel.plan import visible_band
from megatron.core.context_parallel.ring import ring_attention
from megatron.core.errors import ConfigError

P2P, ALL_GATHER, A2A, A2A_P2P = COMM_TYPES = ("p2p", "all_gather", "a2a", "a2a+p2p")

# (query, key, value, mask, causal, dropout_p) -> [s, b, n*dv], over a whole sequence
WholeAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float], Tensor]


def comm_type_of_layer(config: Any, layer_number: int) -> str:
    """``config.cp_comm_type`` of a layer, counted from 1 over the whole model; p2p where nothing is set."""
    kinds = config.cp_comm_type
    if isinstance(kinds, list | tuple):
        # Layers behind the last one predict further tokens, and do as it does.
        kinds = kinds[0] if len(kinds) == 1 else kinds[min(layer_number, len(kinds)) - 1]
    return kinds or P2P


class ContextParallelAttention:
    """Attention of this rank's queries to a sequence that all context-parallel ranks hold together.

    * ``p2p``: keys and values travel round a ring while blocks are computed.
    * ``all_gather``: keys and values are gathered first.
    * ``a2a``: every rank gets the whole sequence for some of the heads (a group's keys are copied where
      there are fewer query groups than ranks).
    * ``a2a+p2p``: ``a2a`` in the inner groups of ``hierarchical_context_parallel_sizes``, ``p2p`` between.

    Ring and gathered attention compute in blocks, whose functions are those of ``fusions.block_attention``
    for every ``attention_backend``; operands stay [s, b, n, d] for every ``attention_layout``, because
    what is sent is then contiguous.

    Args:
        config: model config.
        kind: one of the four.

    Raises:
        ConfigError: no such kind, or sizes that it cannot share.
    """

    def __init__(self, config: Any, kind: str):
        self.config, self.kind = config, kind
        self.size = config.context_parallel_size
        if kind not in COMM_TYPES:
            raise ConfigError(f"cp_comm_type {kind!r}: choose one of {', '.join(COMM_TYPES)}")
        tensor_ranks = config.tensor_model_parallel_size
        heads, groups = (
            max(1, count // tensor_ranks) for count in (config.num_attention_heads, config.num_query_groups)
        )
        if kind == A2A:
            check_heads(heads, groups, self.size)
        if kind == A2A_P2P:
            check_heads(heads, groups, _inner_size(config))

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        causal: bool,
        softmax_scale: float,
        dropout_p: float,
        whole: WholeAttention,
    ) -> Tensor:
        """[s/cp, b, n, d], 2 x [s/cp, b, g, d] -> [s/cp, b, n*dv]

        Args:
            query, key, value: this rank's chunks r and 2*CP-1-r.
            attention_mask: bool [b or 1, 1, s/cp, s], this rank's queries against all keys, or None.
            causal: mask keys after the query.
            softmax_scale: factor in front of the scores.
            dropout_p: probability of dropping a weight.
            whole: attention over an unsplit sequence; used by ``a2a``.
        """
        _check_operands(query, key, attention_mask, self.size)
        seed = _draw_seed() if dropout_p > 0.0 else 0
        group = parallel_state.get_context_parallel_group()
        assert group is not None, "an error otherwise"
        if self.kind == A2A:
            q, k, v = to_heads(query, key, value, group)
            mask = None if attention_mask is None else gather_mask(attention_mask, group)
            with _stream_of(seed, dropout_p):
                return from_heads(whole(q, k, v, mask, causal, dropout_p), group)
        band = visible_band(causal, self.config.window_size)
        cap = self.config.attn_logit_softcapping
        split = SplitAttention(band, attention_mask, softmax_scale, dropout_p, seed, cap)
        if self.kind == A2A_P2P:
            return _hierarchical(query, key, value, split)
        attend = ring_attention if self.kind == P2P else gather_attention
        return attend(query, key, value, split, group).flatten(2)


def _hierarchical(query: Tensor, key: Tensor, value: Tensor, split: SplitAttention) -> Tensor:
    """Heads for positions inside, a ring between: an inner group together holds a zigzag part of its ring."""
    inner, outer = _two_levels()
    q, k, v = to_heads(query, key, value, inner)
    mask = None if split.attention_mask is None else gather_mask(split.attention_mask, inner)
    inside = dataclasses.replace(split, attention_mask=mask)
    return from_heads(ring_attention(q, k, v, inside, outer).flatten(2), inner)


def _two_levels() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Groups of consecutive ranks, and of one rank of each of those."""
    groups = parallel_state.get_hierarchical_context_parallel_groups()
    assert groups is not None, "an error otherwise"
    inner, outer = groups
    return inner, outer


def _inner_size(config: Any) -> int:
    sizes = config.hierarchical_context_parallel_sizes
    if sizes is None or len(sizes) != 2 or sizes[0] * sizes[1] != config.context_parallel_size:
        raise ConfigError(
            f"cp_comm_type a2a+p2p: hierarchical_context_parallel_sizes is {sizes}; give two sizes whose "
            f"product is {config.context_parallel_size}: the inner (a2a) and the outer (p2p)"
        )
    return sizes[0]


def _check_operands(query: Tensor, key: Tensor, mask: Tensor | None, size: int) -> None:
    length = query.shape[0]
    if key.shape[0] != length or length % 2:
        raise ConfigError(
            f"context parallelism: {length} queries and {key.shape[0]} keys on a rank; it needs equal even "
            f"numbers (two chunks of the sequence): use a sequence_length that is a multiple of {2 * size}"
        )
    wanted = (length, length * size)
    if mask is not None and tuple(mask.shape[-2:]) != wanted:
        raise ConfigError(
            f"context parallelism: an attention mask of {tuple(mask.shape)} for {length} queries on each of "
            f"{size} ranks; its last two sizes must be {wanted}, as get_batch_on_this_cp_rank makes it"
        )


def _draw_seed() -> int:
    """A seed for this rank's masks from the current stream, which context-parallel ranks share."""
    return mixed_seed(
        int(torch.randint(1 << 62, ())),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
    )


@contextlib.contextmanager
def _stream_of(seed: int, dropout_p: float) -> Iterator[None]:
    """A random stream of this rank's own for the device's default generator, put back afterwards."""
    if dropout_p == 0.0:
        yield
        return
    state = accelerator.get_rng_state()
    accelerator.manual_seed(seed)
    try:
        yield
    finally:
        accelerator.set_rng_state(state)
