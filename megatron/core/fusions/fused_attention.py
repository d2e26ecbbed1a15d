"""Attention in one operation, on operands in the layouts that fused kernels take, and of packed sequences.

With dropout on a CPU, whose own kernel has none, it is computed exactly and in blocks: nothing of size
sq x sk is kept for backward. So it is with a soft cap, which torch's kernels do not have, on every device.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import accelerator
from megatron.core.fusions.attention_masks import band_mask, covers, whole_band
from megatron.core.fusions.block_attention import BlockShape, attention_in_steps
from megatron.core.fusions.fused_bias_dropout import drops_by_lanes, keep_mask
from megatron.core.fusions.fused_softmax import MASKED_SCORE
from megatron.core.overrides import overridable

Window = tuple[int, int]

# Queries are taken this many at a time, so that causal blocks skip the keys after their last query.
_QUERY_BLOCK = 256


@overridable
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    num_query_groups: int,
    layout: str = "SBH",
    causal: bool = True,
    window: Window | None = None,
    attention_mask: Tensor | None = None,
    softmax_scale: float = 1.0,
    dropout_p: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """``dropout(softmax(masked(scale * Q K^T))) V`` for every head.

    Args:
        query: [sq, b, n*d] for layout SBH, [b, sq, n*d] for BSH, [b, n, sq, d] for BNSD.
        key: [sk, b, g*d], [b, sk, g*d] or [b, g, sk, d]; query head j uses group ``j // (n/g)``.
        value: as ``key``, possibly with another width per head.
        num_heads: n.
        num_query_groups: g, a divisor of n.
        layout: ``"SBH"``, ``"BSH"`` or ``"BNSD"``, of operands and result.
        causal: mask keys after the query. The last query sits at the last key when lengths differ.
        window: (left, right): query i sees keys i-left..i+right only; -1 for no limit.
        attention_mask: bool [b or 1, 1, sq, sk], True masks, in addition to the two above.
        softmax_scale: factor in front of the scores.
        dropout_p: probability of dropping an attention weight, drawn from the current random stream.
        softcap: c turns scaled scores x into ``c * tanh(x / c)``, before masking; None leaves them.

    Returns:
        [sq, b, n*dv], [b, sq, n*dv] or [b, n, sq, dv], in the dtype of ``query``.
    """
    q, k, v = (
        split_heads(t, heads, layout)
        for t, heads in ((query, num_heads), (key, num_query_groups), (value, num_query_groups))
    )
    if softcap is not None:
        band = whole_band(q.shape[2], k.shape[2], causal, window)
        seed = int(torch.randint(1 << 62, (), device=q.device)) if dropout_p > 0.0 else 0
        shape = BlockShape(band, attention_mask, softmax_scale, dropout_p, seed, softcap)
        # [b, n, s, d] -> [s, b, n, d] and back, views
        q, k, v = (t.permute(2, 0, 1, 3) for t in (q, k, v))
        out = attention_in_steps(q, k, v, shape)
        return join_heads(out.permute(1, 2, 0, 3), layout)
    compute = accelerator.matmul_compute_dtype(query.dtype, query.device)
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    sizes = (q.shape[2], k.shape[2])
    if drops_by_lanes(dropout_p) and not accelerator.draws_in_parallel(q.device):
        masked = masked_keys(*sizes, causal, window, attention_mask, q.device)
        shape = AttentionShape(masked, causal, softmax_scale, dropout_p)
        return join_heads(attention_with_dropout(q, k, v, shape).to(query.dtype), layout)
    mask = visible_keys(*sizes, causal, window, attention_mask, q.device)
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal and mask is None,
        scale=softmax_scale,
        enable_gqa=num_query_groups != num_heads,
    )
    return join_heads(out.to(query.dtype), layout)


def split_heads(t: Tensor, heads: int, layout: str) -> Tensor:
    """[s, b, n*d] (SBH), [b, s, n*d] (BSH) or [b, n, s, d] (BNSD) -> [b, n, s, d], a view."""
    if layout == "BNSD":
        return t
    t = t.unflatten(-1, (heads, -1))
    # [s, b, n, d] or [b, s, n, d] -> [b, n, s, d]
    return t.permute(1, 2, 0, 3) if layout == "SBH" else t.transpose(1, 2)


def join_heads(t: Tensor, layout: str) -> Tensor:
    """[b, n, s, d] -> [s, b, n*d] (SBH), [b, s, n*d] (BSH) or as it is (BNSD)."""
    if layout == "BNSD":
        return t
    return (t.permute(2, 0, 1, 3) if layout == "SBH" else t.transpose(1, 2)).flatten(2)


def visible_keys(
    sq: int,
    sk: int,
    causal: bool,
    window: Window | None,
    attention_mask: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Bool mask, True where a key is *visible*, broadcastable to [b, n, sq, sk].

    None where ``is_causal`` (or nothing) says all there is to say, so that a kernel can skip masked blocks.
    """
    if window is not None and covers(window, sq, sk, causal):
        window = None
    if attention_mask is None and window is None and (not causal or sq == sk):
        return None
    masked = masked_keys(sq, sk, causal, window, attention_mask, device)
    return None if masked is None else ~masked


def masked_keys(
    sq: int,
    sk: int,
    causal: bool,
    window: Window | None,
    attention_mask: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Bool mask [b or 1, 1, sq, sk], True where a key is masked; None if nothing is."""
    if window is not None and covers(window, sq, sk, causal):
        window = None
    if not causal and window is None:
        return attention_mask
    # [sq, sk] -> [1, 1, sq, sk]
    band = band_mask(sq, sk, window, causal, device)[None, None]
    return band if attention_mask is None else band | attention_mask


@overridable
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_ends: list[int],
    key_ends: list[int],
    causal: bool,
    window: Window | None,
    softmax_scale: float,
    dropout_p: float,
    softcap: float | None = None,
) -> Tensor:
    """``dropout(softmax(masked(scale * Q K^T))) V`` of every head, sequence by sequence.

    Args:
        query: [t, n, d].
        key: [u, g, d]; query head j uses group ``j // (n/g)``.
        value: [u, g, dv].
        query_ends: where each sequence ends among the queries, ascending, the last one t; on the host.
        key_ends: the same among the keys, the last one u.
        causal: mask keys after the query. The last query of a sequence sits at its last key.
        window: (left, right) as in ``fused_attention``.
        softmax_scale: factor in front of the scores.
        dropout_p: probability of dropping an attention weight.
        softcap: as in ``fused_attention``.

    Returns:
        [t, n, dv] in the dtype of ``query``.
    """
    spans = zip(_spans(query_ends), _spans(key_ends), strict=True)
    parts = [
        fused_attention(
            # [s, n, d] -> [s, 1, n*d]
            *(t[span].flatten(1).unsqueeze(1) for t, span in ((query, rows), (key, keys), (value, keys))),
            num_heads=query.shape[1],
            num_query_groups=key.shape[1],
            causal=causal,
            window=window,
            softmax_scale=softmax_scale,
            dropout_p=dropout_p,
            softcap=softcap,
        )
        for rows, keys in spans
        if rows.stop > rows.start
    ]
    return torch.cat(parts).view(query.shape[0], query.shape[1], value.shape[-1])


def _spans(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


@dataclass(frozen=True)
class AttentionShape:
    """What an attention computes besides its operands.

    Attributes:
        masked: bool, True masks; broadcastable to [b, 1, sq, sk]; or None.
        causal: no query sees keys after itself (``masked`` says so too).
        scale: factor in front of the scores.
        dropout_p: probability of dropping a weight.
    """

    masked: Tensor | None
    causal: bool
    scale: float
    dropout_p: float


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    """``dropout(softmax(masked(scale * Q K^T))) V``.

    q: [b, n, sq, d], k: [b, g, sk, d], v: [b, g, sk, dv] -> [b, n, sq, dv]. Backward recomputes the weights.
    """
    seed = int(torch.randint(1 << 62, ()))
    return _AttentionWithDropout.apply(q, k, v, shape, seed)


@dataclass(frozen=True)
class _Block:
    """Some groups of one sequence, with some of its queries and the keys these may see."""

    sequence: int
    groups: slice
    queries: slice
    keys: slice
    seed: int


def _blocks(q: Tensor, k: Tensor, causal: bool, seed: int) -> Iterator[_Block]:
    (b, n, sq, _), (_, g, sk, _) = q.shape, k.shape
    weights_per_group = n // g * min(sq, _QUERY_BLOCK) * sk
    groups_at_once = max(1, 4 * accelerator.block_elements(q.device) // weights_per_group)
    number = 0
    for sequence in range(b):
        for first_group in range(0, g, groups_at_once):
            groups = slice(first_group, min(first_group + groups_at_once, g))
            for first in range(0, sq, _QUERY_BLOCK):
                last = min(first + _QUERY_BLOCK, sq)
                visible = min(sk, last + sk - sq) if causal else sk
                yield _Block(sequence, groups, slice(first, last), slice(0, visible), seed + number)
                number += 1


def _probabilities(q: Tensor, k: Tensor, shape: AttentionShape, block: _Block) -> Tensor:
    """Attention weights before dropout.  q: [G, r*rows, d], k: [G, keys, d] -> [G, r*rows, keys]"""
    scores = torch.bmm(q, k.transpose(1, 2)).mul_(shape.scale)
    if shape.masked is not None:
        per_sequence = shape.masked.expand(max(block.sequence + 1, shape.masked.shape[0]), -1, -1, -1)
        masked = per_sequence[block.sequence, 0, block.queries, block.keys]
        # [G, r*rows, keys] -> [G, r, rows, keys], where the mask is the same for all heads
        scores.unflatten(1, (-1, masked.shape[0])).masked_fill_(masked, MASKED_SCORE)
    return torch.softmax(scores, dim=-1)


def _operands(q: Tensor, k: Tensor, v: Tensor, block: _Block) -> tuple[Tensor, Tensor, Tensor]:
    """The block's queries [G, r*rows, d], keys [G, keys, d] and values [G, keys, dv]."""
    return (
        _queries(q, block, k.shape[1]),
        k[block.sequence, block.groups, block.keys],
        v[block.sequence, block.groups, block.keys],
    )


def _queries(t: Tensor, block: _Block, groups: int) -> Tensor:
    """[b, n, sq, d] -> [G, r*rows, d]: the rows of the r heads of a group one after the other."""
    # [n, rows, d] -> [g, r, rows, d]
    per_group = t[block.sequence, :, block.queries].unflatten(0, (groups, -1))
    return per_group[block.groups].flatten(1, 2)


class _AttentionWithDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, seed: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.shape, ctx.seed = shape, seed
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
        for block in _blocks(q, k, shape.causal, seed):
            q_block, k_block, v_block = _operands(q, k, v, block)
            weights = _probabilities(q_block, k_block, shape, block)
            keep, scale = keep_mask(weights.shape, shape.dropout_p, block.seed)
            result = torch.bmm(weights.mul_(keep), v_block).mul_(scale)
            _store(out, result, block, k.shape[1])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v = ctx.saved_tensors
        shape, groups = ctx.shape, k.shape[1]
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in _blocks(q, k, shape.causal, ctx.seed):
            q_block, k_block, v_block = _operands(q, k, v, block)
            weights = _probabilities(q_block, k_block, shape, block)
            keep, scale = keep_mask(weights.shape, shape.dropout_p, block.seed)
            grad_out = _queries(grad, block, groups) * scale
            grad_v_block = torch.bmm((weights * keep).transpose(1, 2), grad_out)
            grad_weights = torch.bmm(grad_out, v_block.transpose(1, 2)).mul_(keep)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_scores.mul_(shape.scale)
            _store(grad_q, torch.bmm(grad_scores, k_block), block, groups)
            grad_k[block.sequence, block.groups, block.keys] += torch.bmm(
                grad_scores.transpose(1, 2), q_block
            )
            grad_v[block.sequence, block.groups, block.keys] += grad_v_block
        return grad_q, grad_k, grad_v, None, None


def _store(out: Tensor, result: Tensor, block: _Block, groups: int) -> None:
    """Writes [G, r*rows, d] to its place in [b, n, sq, d]."""
    rows = block.queries.stop - block.queries.start
    target = out[block.sequence, :, block.queries].unflatten(0, (groups, -1))
    target[block.groups] = result.unflatten(1, (-1, rows))
