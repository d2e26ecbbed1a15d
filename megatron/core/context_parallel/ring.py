"""Ring attention: queries stay, keys and values travel (Liu et al., 2023)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.context_parallel.partial import (
    Packed,
    PartialAttention,
    SavedAttention,
    SplitAttention,
    add_blocks,
)
from megatron.core.context_parallel.plan import Task, local_segments, plan_blocks, ring_hops


class _Transfer:
    """A message on its way."""

    def __init__(self, received: Tensor, sent: Tensor, works: list[Any]):
        # The message being sent must stay alive as long as the one being received.
        self._received, self._sent, self._works = received, sent, works

    def wait(self) -> Tensor:
        """The received message; the sent buffer may be written again."""
        for work in self._works:
            work.wait()
        return self._received


class _Ring:
    """Neighbours of this rank."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._global_ranks = dist.get_process_group_ranks(group)

    def shift(self, t: Tensor, distance: int) -> _Transfer:
        """Sends ``t`` to the rank ``distance`` further on; receives what the rank as far back sends."""
        received = torch.empty_like(t)
        to, source = (self._global_ranks[(self.rank + d) % self.size] for d in (distance, -distance))
        operations = [
            dist.P2POp(dist.isend, t, to, self.group),
            dist.P2POp(dist.irecv, received, source, self.group),
        ]
        return _Transfer(received, t, dist.batch_isend_irecv(operations))


@dataclass(frozen=True)
class _Visit:
    """Keys of another rank at this one: the ``hop``-th of ``hops`` in ``direction`` (+1 up, -1 down)."""

    owner: int
    flat: Tensor
    direction: int = 0
    hop: int = 0
    hops: int = 0


def _visits(ring: _Ring, flat: Tensor, hops: tuple[int, int]) -> Iterator[_Visit]:
    """This rank's keys, then those that come by; the next are on their way while a visit is worked on."""
    visit = _Visit(ring.rank, flat)
    for direction, count in ((1, hops[0]), (-1, hops[1])):
        for hop in range(1, count + 1):
            coming = ring.shift(flat if hop == 1 else visit.flat, direction)
            yield visit
            owner = (ring.rank - direction * hop) % ring.size
            visit = _Visit(owner, coming.wait(), direction, hop, count)
    yield visit


class _Journey:
    """Gradients of keys: they follow their keys from rank to rank, one hop behind, and are sent home."""

    def __init__(self, ring: _Ring):
        self._ring = ring
        self._coming: _Transfer | None = None
        self._home: list[_Transfer] = []

    def add(self, visit: _Visit, own: Tensor) -> None:
        """Adds this rank's share (fp32, flat) to the gradients of the visiting keys and sends them on."""
        if self._coming is not None:
            own = own + self._coming.wait()
            self._coming = None
        own = own.to(visit.flat.dtype)
        if visit.hop < visit.hops:
            self._coming = self._ring.shift(own, visit.direction)
        else:
            self._home.append(self._ring.shift(own, -visit.direction * visit.hops))

    def arrive(self, home: Tensor) -> Tensor:
        """Adds what the other ranks found to this rank's share for its own keys."""
        for transfer in self._home:
            home += transfer.wait()
        return home


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spec: SplitAttention, group: dist.ProcessGroup
    ) -> Tensor:
        ring, packed = _Ring(group), Packed(k, v)
        partial = PartialAttention(q, v)
        hops = ring_hops(ring.size, q.shape[0], spec.band)
        for visit in _visits(ring, packed.pack(k, v), hops):
            tasks = _tasks(ring, visit.owner, q.shape[0], spec)
            add_blocks(partial, tasks, q, *packed.unpack(visit.flat), spec)
        out, lse = partial.result(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.spec, ctx.ring, ctx.packed, ctx.hops = spec, ring, packed, hops
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        spec, ring, packed = ctx.spec, ctx.ring, ctx.packed
        saved = SavedAttention(q, out, lse, grad_out)
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q = torch.zeros_like(q, dtype=wide)
        journey = _Journey(ring)
        home: Tensor | None = None
        for visit in _visits(ring, packed.pack(k, v), ctx.hops):
            own = torch.zeros(visit.flat.shape, dtype=wide, device=q.device)
            tasks = _tasks(ring, visit.owner, q.shape[0], spec)
            grads = (grad_q, *packed.unpack(own))
            key, value = packed.unpack(visit.flat)
            saved.add_gradients(tasks, key, value, spec, grads)
            if visit.hop == 0:
                home = own
            else:
                journey.add(visit, own)
        assert home is not None, "the first visit is that of the own keys"
        grad_k, grad_v = packed.unpack(journey.arrive(home))
        return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype), None, None


def _tasks(ring: _Ring, owner: int, local_length: int, spec: SplitAttention) -> tuple[Task, ...]:
    mine, theirs = (local_segments(rank, ring.size, local_length) for rank in (ring.rank, owner))
    return plan_blocks(mine, theirs, spec.band, joined=spec.attention_mask is None)


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, spec: SplitAttention, group: dist.ProcessGroup
) -> Tensor:
    """Attention of this rank's queries to the whole sequence; keys and values travel round ``group``.

    Keys travel once in forward; in backward they travel again, and their gradients one hop behind them, in
    the type of the keys, each rank adding its share in fp32.

    Args:
        query: [s/size, b, n, d], chunks r and 2*size-1-r of the sequence.
        key: [s/size, b, g, d].
        value: [s/size, b, g, dv].
        spec: what is computed.
        group: ranks in the order of their chunks.

    Returns:
        [s/size, b, n, dv] in the dtype of ``query``.
    """
    return _RingAttention.apply(query, key, value, spec, group)
