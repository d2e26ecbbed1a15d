"""Applying rotary angles to queries and keys."""

import torch
from torch import Tensor

from megatron.core.context_parallel.zigzag import own_place, take_chunks
from megatron.core.errors import NotBuiltYetError
from megatron.core.fusions.rotary import rotary
from megatron.core.transformer.transformer_config import TransformerConfig


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    config: TransformerConfig,
    cu_seqlens: Tensor | None = None,
    mscale: float = 1.0,
) -> Tensor:
    """Rotates the first channels of every head.

    Args:
        t: [s, b, n, d].
        freqs: angles [s, 1, 1, d_rot] with d_rot <= d; channels beyond d_rot pass through.
        config: ``rotary_interleaved`` chooses which channels form a pair.
        cu_seqlens: boundaries of packed sequences, not built yet.
        mscale: factor of the rotated part.
    """
    if cu_seqlens is not None:
        raise NotBuiltYetError("rotary embedding of packed sequences", remedy="Pass cu_seqlens=None.")
    cos, sin = ((wave(freqs) * mscale).to(t.dtype) for wave in (torch.cos, torch.sin))
    return apply_rotary_pos_emb_with_cos_sin(t, cos, sin, config.rotary_interleaved)


def apply_rotary_pos_emb_with_cos_sin(
    t: Tensor, cos: Tensor, sin: Tensor, rotary_interleaved: bool = False
) -> Tensor:
    """Rotates the first channels by tables.  t: [s, b, n, d], cos and sin: [s, 1, 1, d_rot]."""
    width = cos.shape[-1]
    if width == t.shape[-1]:
        return rotary(t, cos, sin, rotary_interleaved)
    rotated = rotary(t[..., :width], cos, sin, rotary_interleaved)
    return torch.cat((rotated, t[..., width:]), dim=-1)


def get_pos_emb_on_this_cp_rank(pos_emb: Tensor, seq_dim: int) -> Tensor:
    """Angles of the positions on this context-parallel rank.

    Args:
        pos_emb: one entry per position of the whole sequence along ``seq_dim``.
        seq_dim: dimension of positions.

    Returns:
        Chunks r and 2*CP-1-r of 2*CP, in this order: all of it at size 1.

    Raises:
        ConfigError: the positions do not divide into 2*CP chunks.
    """
    return take_chunks(pos_emb, seq_dim, *own_place())
