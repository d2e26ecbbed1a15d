"""Attention with dropout where the fused kernel has none: exact, in blocks, nothing of size s^2 kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core import accelerator
from megatron.core.fusions.dropout import keep_mask
from megatron.core.fusions.softmax import HIDDEN_SCORE

# Queries are taken this many at a time, so that causal blocks skip the keys after their last query.
_QUERY_BLOCK = 256


@dataclass(frozen=True)
class AttentionShape:
    """What an attention computes besides its operands.

    Attributes:
        hidden: bool, True hides; broadcastable to [b, 1, sq, sk]; or None.
        causal: no query sees keys after itself (``hidden`` says so too).
        scale: factor in front of the scores.
        dropout_p: probability of dropping a weight.
    """

    hidden: Tensor | None
    causal: bool
    scale: float
    dropout_p: float


def attention_with_dropout(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    """``dropout(softmax(hide(scale * Q K^T))) V``.

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
    if shape.hidden is not None:
        per_sequence = shape.hidden.expand(max(block.sequence + 1, shape.hidden.shape[0]), -1, -1, -1)
        hidden = per_sequence[block.sequence, 0, block.queries, block.keys]
        # [G, r*rows, keys] -> [G, r, rows, keys], where the mask is the same for all heads
        scores.unflatten(1, (-1, hidden.shape[0])).masked_fill_(hidden, HIDDEN_SCORE)
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
