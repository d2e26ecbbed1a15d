"""Attention of some queries to some keys of a longer sequence, in parts that can be put together.

A part is the attention over its own keys and the logarithm of the sum of its exponentiated scores (Milakov
and Gimelshein, 2018; Liu et al., 2023, "Ring Attention"). Parts merge exactly, whatever the order, and the
gradient of one block needs only its operands and the merged result: nothing of size sq x sk is kept.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron.core import accelerator
from megatron.core.fusions.attention_masks import Band, Stripe, masked_in_stripe, stripes
from megatron.core.fusions.fused_bias_dropout import drops_by_lanes, keep_mask
from megatron.core.overrides import overridable

# Log-sum-exp of a query that sees no key. Finite, so that merging two such parts gives no NaN.
NOTHING_VISIBLE = -1e30
# Scores of a tile in fp32, at most; a step of backward holds four tensors of this size.
_MOST_SCORES = 1 << 26


@overridable
def block_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    band: Band,
    attention_mask: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``dropout(softmax(masked(scale * Q K^T))) V`` over the keys of one block.

    Args:
        query: [sq, b, n, d].
        key: [sk, b, g, d]; query head j uses group ``j // (n/g)``.
        value: [sk, b, g, dv].
        band: keys each query may see.
        attention_mask: bool [b or 1, 1, sq, sk], True masks in addition; or None.
        softmax_scale: factor in front of the scores.
        dropout_p: probability of dropping a weight. Dropping does not change the second result.
        dropout_seed: the mask is a pure function of this number and the shapes, so that backward can make
            it again; no random stream is touched.
        softcap: c turns scaled scores x into ``c * tanh(x / c)``, before masking; None leaves them.

    Returns:
        Output [sq, b, n, dv] in the dtype of ``query`` or wider, and the log-sum-exp of the scores
        [b, n, sq] in fp32 (fp64 operands: fp64). A query that sees nothing here has output 0 and
        log-sum-exp ``NOTHING_VISIBLE``.
    """
    shape = BlockShape(band, attention_mask, softmax_scale, dropout_p, dropout_seed, softcap)
    if not _has_flash(query, value, shape):
        return forward_in_steps(query, key, value, shape)
    compute = accelerator.matmul_compute_dtype(query.dtype, query.device)
    q, k, v = (_heads_first(t.to(compute)) for t in (query, key, value))
    sq, sk = q.shape[2], k.shape[2]
    if attention_mask is None and (band == Band() or band.is_causal(sq, sk)):
        out, lse = _flash(q, k, v, 0.0, band != Band(), scale=softmax_scale)
        return out.permute(2, 0, 1, 3), lse
    # [sq, b, n, dv], so that the permuted view of a stripe is written in place
    out = q.new_zeros(sq, *q.shape[:2], v.shape[-1])
    wide = torch.promote_types(compute, torch.float32)
    lse = torch.full(q.shape[:3], NOTHING_VISIBLE, dtype=wide, device=q.device)
    for stripe in stripes(sq, sk, band):
        masked = masked_in_stripe(stripe, attention_mask, q.device)
        rows, keys = stripe.rows, stripe.keys
        out_part, lse_part = _flash(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, False,
            attn_mask=_as_scores(masked, compute), scale=softmax_scale,
        )  # fmt: skip
        if masked is not None:
            # The kernel reports 0 for a row without visible keys, as if there were one key of score 0.
            lse_part = lse_part.masked_fill(masked.all(-1), NOTHING_VISIBLE)
        out[rows] = out_part.permute(2, 0, 1, 3)
        lse[..., rows] = lse_part
    return out, lse


@overridable
def block_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    band: Band,
    attention_mask: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share in the gradients of its operands.

    With ``P = exp(scale * Q K^T - lse)``: ``dS = P * (dropout(dO V^T) - rowsum(dO * O))``, where ``O`` and
    ``lse`` are those of the whole sequence (Dao et al., 2022, appendix B). Behind a soft cap, whose result is
    s, the gradient of a score is ``dS * (1 - (s / cap)^2)``.

    Args:
        grad_out: gradient of the merged output, [sq, b, n, dv].
        query, key, value: as in forward.
        out: merged output, [sq, b, n, dv].
        lse: merged log-sum-exp, [b, n, sq].
        band, attention_mask, softmax_scale, dropout_p, dropout_seed, softcap: as in forward.

    Returns:
        Gradients of query, key and value in their shapes, in the dtype of the operands or wider.
    """
    shape = BlockShape(band, attention_mask, softmax_scale, dropout_p, dropout_seed, softcap)
    if not _has_flash(query, value, shape):
        return backward_in_steps(grad_out, query, key, value, out, lse, shape)
    compute = accelerator.matmul_compute_dtype(query.dtype, query.device)
    grad, q, k, v, merged = (_heads_first(t.to(compute)) for t in (grad_out, query, key, value, out))
    lse = lse.contiguous()
    sq, sk = q.shape[2], k.shape[2]
    if attention_mask is None and (band == Band() or band.is_causal(sq, sk)):
        grads = _flash_backward(grad, q, k, v, merged, lse, 0.0, band != Band(), scale=softmax_scale)
        return _sequence_first(grads)
    wide = torch.promote_types(compute, torch.float32)
    grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
    for stripe in stripes(sq, sk, band):
        rows, keys = stripe.rows, stripe.keys
        masked = masked_in_stripe(stripe, attention_mask, q.device)
        dq, dk, dv = _flash_backward(
            grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], merged[:, :, rows],
            lse[..., rows].contiguous(), 0.0, False,
            attn_mask=_as_scores(masked, compute), scale=softmax_scale,
        )  # fmt: skip
        grad_q[:, :, rows] = dq
        grad_k[:, :, keys] += dk
        grad_v[:, :, keys] += dv
    return _sequence_first((grad_q, grad_k, grad_v))


@overridable
def merge_attention(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from the attention over each (online softmax).

    ``lse = log(e^l1 + e^l2)``, ``out = out1 e^(l1 - lse) + out2 e^(l2 - lse)``. May write to its first two
    operands. With the sum of exponentials 1 and the maximum ``lse`` these are the operands of kernels that
    keep maximum and sum apart.

    Args:
        out: [sq, b, n, dv], fp32 or fp64.
        lse: [b, n, sq], fp32 or fp64.
        block_out: [sq, b, n, dv], any floating type.
        block_lse: as ``lse``.

    Returns:
        The merged pair, in the types of the first two operands.
    """
    share = torch.sigmoid(block_lse - lse)
    # [b, n, sq] -> [sq, b, n, 1]
    out.lerp_(block_out.to(out.dtype), share.permute(2, 0, 1).unsqueeze(-1))
    return out, torch.logaddexp(lse, block_lse)


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _has_flash(query: Tensor, value: Tensor, shape: "BlockShape") -> bool:
    """torch's CPU kernel also returns log-sum-exps; it has no dropout, no soft cap and one width of heads."""
    if accelerator.draws_in_parallel(query.device) or query.shape[-1] != value.shape[-1]:
        return False
    return shape.dropout_p == 0.0 and shape.softcap is None and _flash_takes_any_strides()


@functools.cache
def _flash_takes_any_strides() -> bool:
    """Not before torch 2.9, whose kernels also lay out log-sum-exps otherwise, and gave wrong gradients."""
    q = torch.zeros(1, 2, 3, 4, device="cpu")
    return _flash(q, q, q)[1].is_contiguous()


def _heads_first(t: Tensor) -> Tensor:
    """[s, b, n, d] -> [b, n, s, d], a view."""
    return t.permute(1, 2, 0, 3)


def _sequence_first(grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """[b, n, s, d] -> [s, b, n, d], views."""
    dq, dk, dv = (t.permute(2, 0, 1, 3) for t in grads)
    return dq, dk, dv


def _as_scores(masked: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores: minus infinity where a key is masked."""
    if masked is None:
        return None
    return torch.zeros(masked.shape, dtype=dtype, device=masked.device).masked_fill_(masked, -torch.inf)


class BlockShape(NamedTuple):
    """What a block computes besides its operands; see :func:`block_attention.block_attention`."""

    band: Band
    attention_mask: Tensor | None
    scale: float
    dropout_p: float
    seed: int
    softcap: float | None = None


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
        scores, _ = _scores(q, k, shape, tile)
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
        scores, slope = _scores(q, k, shape, tile, with_slope=True)
        weights = scores.sub_(row_lse).exp_()
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
        if slope is not None:
            grad_scores.mul_(slope)
        _add_to_keys(grad_k, torch.bmm(grad_scores.transpose(1, 2), _queries(q, tile, groups)), tile)
        dq = _split_rows(torch.bmm(grad_scores, _keys(k, tile)), tile)
        # Several stripes never share rows, so this is written once.
        _rows(grad_q, tile, groups).copy_(dq.permute(2, 0, 1, 3))
    return grad_q, grad_k, grad_v


def attention_in_steps(query: Tensor, key: Tensor, value: Tensor, shape: BlockShape) -> Tensor:
    """:func:`block_attention` over all keys there are, differentiable, by explicit steps on every device.

    query [sq, b, n, d], key [sk, b, g, d], value [sk, b, g, dv] -> [sq, b, n, dv] in the dtype of ``query``
    """
    return _AttentionInSteps.apply(query, key, value, shape)


class _AttentionInSteps(torch.autograd.Function):
    """Keeps its operands, its result and the log-sum-exps."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shape: BlockShape) -> Tensor:
        out, lse = forward_in_steps(q, k, v, shape)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = backward_in_steps(grad, q, k, v, out, lse, ctx.shape)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


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


def _scores(
    q: Tensor, k: Tensor, shape: BlockShape, tile: _Tile, with_slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """[G, r*rows, keys], masked ones minus infinity; and, if asked for, the derivative of their soft cap."""
    scores = torch.bmm(_queries(q, tile, k.shape[2]), _keys(k, tile).transpose(1, 2)).mul_(shape.scale)
    slope = None
    if shape.softcap is not None:
        scores.div_(shape.softcap).tanh_()
        slope = scores.square().neg_().add_(1.0) if with_slope else None
        scores.mul_(shape.softcap)
    mask = shape.attention_mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask[tile.sequence : tile.sequence + 1]
    masked = masked_in_stripe(tile.stripe, mask, q.device)
    if masked is not None:
        _split_rows(scores, tile).masked_fill_(masked, -torch.inf)
    return scores, slope


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
