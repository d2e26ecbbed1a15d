"""Applying rotary angles to queries and keys."""

import itertools

import torch
from torch import Tensor

from megatron.core.context_parallel.zigzag import chunk_length, chunks_of_rank, own_place, take_chunks
from megatron.core.errors import UsageError
from megatron.core.fusions.embeddings import rotary
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
        t: [s, b, n, d], or with ``cu_seqlens`` rows of all sequences, [t, n, d] or [t, 1, n, d].
        freqs: angles [s, 1, 1, d_rot] with d_rot <= d; channels beyond d_rot pass through.
        config: ``rotary_interleaved`` chooses which channels form a pair. With ``multi_latent_attention``
            pairs are neighbours as well, and leave in the order even channels, then odd ones.
        cu_seqlens: where packed sequences begin, and where the last one ends; positions start anew in each.
            Context-parallel ranks hold chunks of every sequence, and ``freqs`` all positions.
        mscale: factor of the rotated part.

    Raises:
        UsageError: packed sequences that are not as long as the rows, or longer than the table.
    """
    if cu_seqlens is not None:
        freqs = freqs[_packed_positions(cu_seqlens, t.shape[0], freqs.shape[0]).to(freqs.device)]
    options = (config.rotary_interleaved, config.multi_latent_attention, mscale)
    if t.dim() == 3:
        return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs, *options).squeeze(1)
    return _apply_rotary_pos_emb_bshd(t, freqs, *options)


def apply_rotary_pos_emb_with_cos_sin(
    t: Tensor, cos: Tensor, sin: Tensor, rotary_interleaved: bool = False
) -> Tensor:
    """Rotates the first channels by tables.

    Args:
        t: [s, b, n, d].
        cos, sin: [s, d_rot / 2], as :meth:`RotaryEmbedding.get_cos_sin` gives them: an entry per pair; or
            [s, 1, 1, d_rot], an entry per channel. Rows after the s-th are left out.
        rotary_interleaved: pairs are neighbouring channels.
    """

    def of_sequence(table: Tensor) -> Tensor:
        if table.dim() == 2:
            # [s, d_rot / 2] -> [s, 1, 1, d_rot]
            table = angles_of_channels(table, rotary_interleaved)[:, None, None, :]
        if table.shape[0] < t.shape[0]:
            raise UsageError(f"tables of {table.shape[0]} positions for a sequence of {t.shape[0]}")
        return table[: t.shape[0]].to(t.dtype)

    return _rotate_first_channels(t, of_sequence(cos), of_sequence(sin), rotary_interleaved)


def _apply_rotary_pos_emb_bshd(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    """Rotates the first channels of every head.  t: [s, b, n, d], freqs: [s, 1, 1, d_rot]

    Args:
        multi_latent_attention: first bring the rotated channels into the order even, then odd.
        mscale: factor of the rotated part.
    """
    if multi_latent_attention:
        width = freqs.shape[-1]
        t = torch.cat((t[..., 0:width:2], t[..., 1:width:2], t[..., width:]), dim=-1)
    cos, sin = ((wave(freqs) * mscale).to(t.dtype) for wave in (torch.cos, torch.sin))
    return _rotate_first_channels(t, cos, sin, rotary_interleaved)


def _apply_rotary_pos_emb_thd(
    t: Tensor,
    cu_seqlens: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    """The same for packed sequences.  t: [t, n, d], cu_seqlens and freqs as of the public function."""
    freqs = freqs[_packed_positions(cu_seqlens, t.shape[0], freqs.shape[0]).to(freqs.device)]
    options = (rotary_interleaved, multi_latent_attention, mscale)
    return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs, *options).squeeze(1)


def angles_of_channels(angles: Tensor, rotary_interleaved: bool) -> Tensor:
    """Each pair's angle at both of its channels.  [.., d_rot / 2] -> [.., d_rot]"""
    if rotary_interleaved:
        return angles.repeat_interleave(2, dim=-1)
    return torch.cat((angles, angles), dim=-1)


def _rotate_first_channels(t: Tensor, cos: Tensor, sin: Tensor, rotary_interleaved: bool) -> Tensor:
    """t: [s, b, n, d], cos and sin: [s, 1, 1, d_rot] of its dtype."""
    width = cos.shape[-1]
    if width == t.shape[-1]:
        return rotary(t, cos, sin, rotary_interleaved)
    rotated = rotary(t[..., :width], cos, sin, rotary_interleaved)
    return torch.cat((rotated, t[..., width:]), dim=-1)


def _packed_positions(cu_seqlens: Tensor, rows: int, longest: int) -> Tensor:
    """Position within its sequence of every row held here.  [t], on the host"""
    rank, size = own_place()
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    if not lengths or sum(lengths) != rows * size or max(lengths) > longest:
        raise UsageError(
            f"packed sequences of lengths {lengths} do not fit {rows} rows on each of {size} ranks and "
            f"{longest} angles"
        )
    if size == 1:
        return torch.cat([torch.arange(length) for length in lengths])
    parts = []
    for length in lengths:
        piece = chunk_length(length, size)
        parts += [torch.arange(piece) + number * piece for number in chunks_of_rank(rank, size)]
    return torch.cat(parts)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _rotate_half(x: Tensor, rotary_interleaved: bool) -> Tensor:
    """Every channel's partner, negated where it comes second: what the sine of the angle multiplies.

    x: [..., d]; partners are the two halves, or neighbours if interleaved.
    """
    if rotary_interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
        return torch.stack((-second, first), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


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
