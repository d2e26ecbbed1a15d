"""Block attention in explicit steps: any device, any width of heads, with dropout; fp32 inside."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core import accelerator
from megatron.core.fusions.attention_bands import Band, Stripe, hidden_in_stripe, stripes
from megatron.core.fusions.dropout import drops_by_lanes, keep_mask

# Log-sum-exp of a query that sees no key. Finite, so that merging two such parts gives no NaN.
NOTHING_VISIBLE = -1e30
# Scores of a tile in fp32, at most; a step of backward holds four tensors of this size.
_MOST_SCORES = 1 << 26


class BlockShape(NamedTuple):
    """What a block computes besides its operands; see :func:`block_attention.block_attention`."""

    band: Band
    attention_mask: Tensor | None
    scale: float
    dropout_p: float
    seed: int


class _Tile(NamedTuple):
    """A stripe of one sequence and some of its groups: what is computed at a time."""

    stripe: Stripe
    sequence: int
    groups: slice
    seed: int


def forward_in_steps(q: Tensor, k: Tensor, v: Tensor, shape: BlockShape) -> tuple[Tensor, Tensor]:
    """q: [sq, b, n, d], k: [sk, b, g, d], v: [sk, b, g, dv] -> ([sq, b, n, dv], [b, n, sq])"""
    (sq, b, n, _), groups = q.shape, k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(sq, b, n, v.shape[-1], dtype=wide, device=q.device)
    lse = torch.full((b, n, sq), NOTHING_VISIBLE, dtype=wide, device=q.device)
    for tile in _tiles(q, k, shape):
        scores = _scores(q, k, shape, tile)
        peak = scores.amax(-1, keepdim=True).clamp_(min=NOTHING_VISIBLE)
        weights = scores.sub_(peak).exp_()
        total = weights.sum(-1, keepdim=True)
        keep_scale = 1.0
        if shape.dropout_p > 0.0:
            keep, keep_scale = replayable_keep_mask(weights.shape, shape.dropout_p, tile.seed, q.device)
            weights.mul_(keep)
        # A row without visible keys has total 0 and weights 0.
        result = torch.bmm(weights, _keys(v, tile)).mul_(keep_scale / total.clamp(min=1e-30))
        _rows(out, tile, groups).copy_(_split_rows(result, tile).permute(2, 0, 1, 3))
        row_lse = (peak + total.log()).clamp_(min=NOTHING_VISIBLE)
        _lse_rows(lse, tile, groups).copy_(_split_rows(row_lse, tile).squeeze(-1))
    return out, lse


def backward_in_steps(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, shape: BlockShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes, fp32 (fp64)."""
    groups = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
    for tile in _tiles(q, k, shape):
        # [G, r, rows] -> [G, r*rows, 1]
        row_lse = _lse_rows(lse, tile, groups).flatten(1).unsqueeze(-1)
        weights = _scores(q, k, shape, tile).sub_(row_lse).exp_()
        grad, result = (_queries(t, tile, groups) for t in (grad_out, out))
        delta = (grad * result).sum(-1, keepdim=True)
        grad_weights = torch.bmm(grad, _keys(v, tile).transpose(1, 2))
        dropped = weights
        if shape.dropout_p > 0.0:
            keep, keep_scale = replayable_keep_mask(weights.shape, shape.dropout_p, tile.seed, q.device)
            grad_weights.mul_(keep).mul_(keep_scale)
            dropped = (weights * keep).mul_(keep_scale)
        # [G, keys, dv] -> [keys, G, dv]
        _add_to_keys(grad_v, torch.bmm(dropped.transpose(1, 2), grad), tile)
        grad_scores = grad_weights.sub_(delta).mul_(weights).mul_(shape.scale)
        _add_to_keys(grad_k, torch.bmm(grad_scores.transpose(1, 2), _queries(q, tile, groups)), tile)
        dq = _split_rows(torch.bmm(grad_scores, _keys(k, tile)), tile)
        # Several stripes never share rows, so this is written once.
        _rows(grad_q, tile, groups).copy_(dq.permute(2, 0, 1, 3))
    return grad_q, grad_k, grad_v


def replayable_keep_mask(
    shape: torch.Size, p: float, seed: int, device: torch.device
) -> tuple[Tensor, float]:
    """Bool mask, False with probability ``p``, and the factor for what is kept; a function of ``seed``."""
    if not accelerator.draws_in_parallel(device) and drops_by_lanes(p):
        return keep_mask(shape, p, seed)
    generator = torch.Generator(device=device).manual_seed(seed)
    keep = torch.rand(shape, generator=generator, device=device) >= p
    return keep, 1.0 / (1.0 - p) if p < 1.0 else 0.0


def _tiles(q: Tensor, k: Tensor, shape: BlockShape) -> Iterator[_Tile]:
    (sq, b, n, _), (sk, _, g, _) = q.shape, k.shape
    number = 0
    for stripe in stripes(sq, sk, shape.band):
        rows, keys = (part.stop - part.start for part in (stripe.rows, stripe.keys))
        scores = min(4 * accelerator.block_elements(q.device), _MOST_SCORES)
        at_once = max(1, scores // (n // g * rows * keys))
        for sequence in range(b):
            for first in range(0, g, at_once):
                groups = slice(first, min(first + at_once, g))
                yield _Tile(stripe, sequence, groups, shape.seed + number)
                number += 1


def _scores(q: Tensor, k: Tensor, shape: BlockShape, tile: _Tile) -> Tensor:
    """[G, r*rows, keys], hidden ones minus infinity."""
    scores = torch.bmm(_queries(q, tile, k.shape[2]), _keys(k, tile).transpose(1, 2)).mul_(shape.scale)
    mask = shape.attention_mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask[tile.sequence : tile.sequence + 1]
    hidden = hidden_in_stripe(tile.stripe, mask, q.device)
    if hidden is not None:
        _split_rows(scores, tile).masked_fill_(hidden, -torch.inf)
    return scores


def _queries(t: Tensor, tile: _Tile, groups: int) -> Tensor:
    """[s, b, n, d] -> [G, r*rows, d] in fp32: the rows of the r heads of a group one after the other."""
    rows = _rows(t, tile, groups)
    # [rows, G, r, d] -> [G, r, rows, d]
    return rows.permute(1, 2, 0, 3).flatten(1, 2).to(torch.promote_types(t.dtype, torch.float32))


def _rows(t: Tensor, tile: _Tile, groups: int) -> Tensor:
    """The tile's part of [s, b, n, d] as a view [rows, G, r, d]."""
    return t[tile.stripe.rows, tile.sequence].unflatten(1, (groups, -1))[:, tile.groups]


def _lse_rows(lse: Tensor, tile: _Tile, groups: int) -> Tensor:
    """The tile's part of [b, n, s] as a view [G, r, rows]."""
    return lse[tile.sequence, :, tile.stripe.rows].unflatten(0, (groups, -1))[tile.groups]


def _keys(t: Tensor, tile: _Tile) -> Tensor:
    """[s, b, g, d] -> [G, keys, d] in fp32."""
    part = t[tile.stripe.keys, tile.sequence, tile.groups].transpose(0, 1)
    return part.to(torch.promote_types(t.dtype, torch.float32))


def _add_to_keys(grad: Tensor, part: Tensor, tile: _Tile) -> None:
    """Adds [G, keys, d] to its place in [s, b, g, d]."""
    grad[tile.stripe.keys, tile.sequence, tile.groups] += part.transpose(0, 1)


def _split_rows(t: Tensor, tile: _Tile) -> Tensor:
    """[G, r*rows, x] -> [G, r, rows, x], a view."""
    return t.unflatten(1, (-1, tile.stripe.rows.stop - tile.stripe.rows.start))
