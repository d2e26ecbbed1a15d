"""All-to-all: from all heads of a part of the sequence to some heads of the whole (Jacobs et al., 2023)."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.collectives import all_gather
from megatron.core.context_parallel.zigzag import to_rank_order, to_sequence_order
from megatron.core.errors import ConfigError
from megatron.core.tensor_parallel.mappings import all_to_all


def check_heads(heads: int, groups: int, size: int) -> None:
    """Refuses numbers of heads, per tensor-parallel rank, that ``size`` ranks cannot share.

    Raises:
        ConfigError: the heads do not divide, or query groups and ranks do not divide one another.
    """
    if heads % size:
        raise ConfigError(
            f"cp_comm_type a2a: {heads} attention heads of a tensor-parallel rank do not divide between "
            f"{size} context-parallel ranks; use p2p or all_gather, or a size that divides {heads}"
        )
    if groups % size and size % groups:
        raise ConfigError(
            f"cp_comm_type a2a: {groups} query groups of a tensor-parallel rank and {size} "
            "context-parallel ranks: one must divide the other; use p2p or all_gather, or other sizes"
        )


def _groups_per_rank(t: Tensor, size: int) -> Tensor:
    """Heads of keys or values that each rank needs: copies where there are fewer groups than ranks.

    [s, b, g, d] -> [s, b, size, max(g/size, 1)*d]
    """
    groups = t.shape[2]
    if groups < size:
        # Ranks p with the same p*g // size work on query heads of the same group.
        t = t.repeat_interleave(size // groups, dim=2)
    return t.unflatten(2, (size, -1)).flatten(3)


def to_heads(
    query: Tensor, key: Tensor, value: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's heads of the sequence that the ranks of ``group`` hold together, in its order.

    Args:
        query: [s, b, n, d] of the rank's part.
        key: [s, b, g, d].
        value: [s, b, g, dv].
        group: consecutive ranks of the context-parallel group.

    Returns:
        [s*size, b, n/size, d], [s*size, b, max(g/size, 1), d] and the same with dv; one all-to-all.
    """
    size = dist.get_world_size(group)
    check_heads(query.shape[2], key.shape[2], size)
    widths = (query.shape[-1], key.shape[-1], value.shape[-1])
    parts = [_groups_per_rank(t, size) for t in (query, key, value)]
    sizes = [part.shape[-1] for part in parts]
    # [s, b, size, w] -> [size, s, b, w]
    packed = torch.cat(parts, dim=-1).permute(2, 0, 1, 3)
    whole = to_sequence_order(all_to_all(group, packed))
    # [s*size, b, w] -> heads
    q, k, v = (
        part.unflatten(-1, (-1, width))
        for part, width in zip(whole.split(sizes, dim=-1), widths, strict=True)
    )
    return q, k, v


def from_heads(out: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back, for results.  [s*size, b, w] -> [s, b, size*w]; one all-to-all."""
    received = all_to_all(group, to_rank_order(out, dist.get_world_size(group)))
    # [size, s, b, w] -> [s, b, size*w]
    return received.permute(1, 2, 0, 3).flatten(2)


def gather_mask(mask: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of the mask for all queries of ``group``.  bool [b or 1, 1, s, x] -> [b or 1, 1, s*size, x]"""
    size = dist.get_world_size(group)
    # [b, 1, s, x] -> [s, b, 1, x]
    mine = mask.permute(2, 0, 1, 3).contiguous().view(torch.uint8)
    gathered = mine.new_empty(size * mine.shape[0], *mine.shape[1:])
    all_gather(gathered, mine, group)
    whole = to_sequence_order(gathered.unflatten(0, (size, -1)))
    return whole.permute(1, 2, 0, 3).view(torch.bool)
