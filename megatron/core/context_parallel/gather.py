"""Attention after gathering the keys and values of all ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.collectives import all_gather, reduce_scatter
from megatron.core.context_parallel.partial import (
    Packed,
    PartialAttention,
    SavedAttention,
    SplitAttention,
    add_blocks,
)
from megatron.core.context_parallel.plan import Task, all_segments, local_segments, plan_blocks
from megatron.core.context_parallel.zigzag import to_rank_order, to_sequence_order


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: SplitAttention, group: dist.ProcessGroup
    ) -> Tensor:
        partial = PartialAttention(q, v)
        tasks = _tasks(group, q.shape[0], spec)
        add_blocks(partial, tasks, q, *_gather(k, v, group), spec)
        out, lse = partial.result(q.dtype)
        # The gathered keys are not kept: memory must not grow with the whole sequence in every layer.
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec, ctx.group, ctx.tasks = spec, group, tasks
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        saved = SavedAttention(q, out, lse, grad_out)
        key, value = _gather(k, v, ctx.group)
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q, grad_key, grad_value = (torch.zeros_like(t, dtype=wide) for t in (q, key, value))
        saved.add_gradients(ctx.tasks, key, value, ctx.spec, (grad_q, grad_key, grad_value))
        grad_k, grad_v = _reduce_scatter(grad_key.to(k.dtype), grad_value.to(v.dtype), k, v, ctx.group)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None


def _tasks(group: dist.ProcessGroup, local_length: int, spec: SplitAttention) -> tuple[Task, ...]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine, everyone = local_segments(rank, size, local_length), all_segments(size, local_length)
    return plan_blocks(mine, everyone, spec.band, joined=spec.attention_mask is None)


def _gather(k: Tensor, v: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """[s/size, b, g, d] of every rank -> [s, b, g, d] in the order of the sequence."""
    packed, size = Packed(k, v), dist.get_world_size(group)
    flat = packed.pack(k, v)
    gathered = flat.new_empty(size * flat.numel())
    all_gather(gathered, flat, group)
    key, value = packed.unpack(gathered.view(size, -1))
    return to_sequence_order(key), to_sequence_order(value)


def _reduce_scatter(
    grad_key: Tensor, grad_value: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """[s, b, g, d] -> this rank's part [s/size, b, g, d] of the sum over ranks."""
    packed, size = Packed(k, v), dist.get_world_size(group)
    parts = [to_rank_order(t, size).flatten(1) for t in (grad_key, grad_value)]
    # 2 x [size, x] -> [size, flat] -> flat
    flat = torch.cat(parts, dim=1).flatten()
    mine = flat.new_empty(flat.numel() // size)
    reduce_scatter(mine, flat, group)
    return packed.unpack(mine)


def gather_attention(
    query: Tensor, key: Tensor, value: Tensor, spec: SplitAttention, group: dist.ProcessGroup
) -> Tensor:
    """Attention of this rank's queries to the whole sequence, gathered in one collective.

    Backward gathers again and sums the gradients of keys and values with one reduce-scatter in their type.

    Args:
        query: [s/size, b, n, d], chunks r and 2*size-1-r of the sequence.
        key: [s/size, b, g, d].
        value: [s/size, b, g, dv].
        spec: what is computed.
        group: ranks in the order of their chunks.

    Returns:
        [s/size, b, n, dv] in the dtype of ``query``.
    """
    return _GatherAttention.apply(query, key, value, spec, group)
