"""Attention of some queries to some keys of a longer sequence, in parts that can be put together.

A part is the attention over its own keys and the logarithm of the sum of its exponentiated scores (Milakov
and Gimelshein, 2018; Liu et al., 2023, "Ring Attention"). Parts merge exactly, whatever the order, and the
gradient of one block needs only its operands and the merged result: nothing of size sq x sk is kept.
"""

import torch
from torch import Tensor

from megatron.core import accelerator
from megatron.core.fusions.attention_bands import Band, hidden_in_stripe, stripes
from megatron.core.fusions.block_attention_steps import (
    NOTHING_VISIBLE,
    BlockShape,
    backward_in_steps,
    forward_in_steps,
)
from megatron.core.overrides import overridable


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
) -> tuple[Tensor, Tensor]:
    """``dropout(softmax(hide(scale * Q K^T))) V`` over the keys of one block.

    Args:
        query: [sq, b, n, d].
        key: [sk, b, g, d]; query head j uses group ``j // (n/g)``.
        value: [sk, b, g, dv].
        band: keys each query may see.
        attention_mask: bool [b or 1, 1, sq, sk], True hides in addition; or None.
        softmax_scale: factor in front of the scores.
        dropout_p: probability of dropping a weight. Dropping does not change the second result.
        dropout_seed: the mask is a pure function of this number and the shapes, so that backward can make
            it again; no random stream is touched.

    Returns:
        Output [sq, b, n, dv] in the dtype of ``query`` or wider, and the log-sum-exp of the scores
        [b, n, sq] in fp32 (fp64 operands: fp64). A query that sees nothing here has output 0 and
        log-sum-exp ``NOTHING_VISIBLE``.
    """
    shape = BlockShape(band, attention_mask, softmax_scale, dropout_p, dropout_seed)
    if not _has_flash(query, value, dropout_p):
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
        hidden = hidden_in_stripe(stripe, attention_mask, q.device)
        rows, keys = stripe.rows, stripe.keys
        out_part, lse_part = _flash(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.0, False,
            attn_mask=_as_scores(hidden, compute), scale=softmax_scale,
        )  # fmt: skip
        if hidden is not None:
            # The kernel reports 0 for a row without visible keys, as if there were one key of score 0.
            lse_part = lse_part.masked_fill(hidden.all(-1), NOTHING_VISIBLE)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share in the gradients of its operands.

    With ``P = exp(scale * Q K^T - lse)``: ``dS = P * (dropout(dO V^T) - rowsum(dO * O))``, where ``O`` and
    ``lse`` are those of the whole sequence (Dao et al., 2022, appendix B).

    Args:
        grad_out: gradient of the merged output, [sq, b, n, dv].
        query, key, value: as in forward.
        out: merged output, [sq, b, n, dv].
        lse: merged log-sum-exp, [b, n, sq].
        band, attention_mask, softmax_scale, dropout_p, dropout_seed: as in forward.

    Returns:
        Gradients of query, key and value in their shapes, in the dtype of the operands or wider.
    """
    shape = BlockShape(band, attention_mask, softmax_scale, dropout_p, dropout_seed)
    if not _has_flash(query, value, dropout_p):
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
        hidden = hidden_in_stripe(stripe, attention_mask, q.device)
        dq, dk, dv = _flash_backward(
            grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], merged[:, :, rows],
            lse[..., rows].contiguous(), 0.0, False,
            attn_mask=_as_scores(hidden, compute), scale=softmax_scale,
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


def _has_flash(query: Tensor, value: Tensor, dropout_p: float) -> bool:
    """torch's CPU kernel also returns log-sum-exps; it knows no dropout and one width of heads only."""
    on_cpu = not accelerator.draws_in_parallel(query.device)
    return on_cpu and dropout_p == 0.0 and query.shape[-1] == value.shape[-1]


def _heads_first(t: Tensor) -> Tensor:
    """[s, b, n, d] -> [b, n, s, d], a view."""
    return t.permute(1, 2, 0, 3)


def _sequence_first(grads: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """[b, n, s, d] -> [s, b, n, d], views."""
    dq, dk, dv = (t.permute(2, 0, 1, 3) for t in grads)
    return dq, dk, dv


def _as_scores(hidden: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores: minus infinity where a key is hidden."""
    if hidden is None:
        return None
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
