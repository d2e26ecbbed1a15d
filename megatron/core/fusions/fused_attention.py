"""Attention in one operation, on operands in the layouts that fused kernels take."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import accelerator
from megatron.core.fusions.attention_dropout import AttentionShape, attention_with_dropout
from megatron.core.fusions.attention_masks import band_mask, covers
from megatron.core.fusions.dropout import drops_by_lanes
from megatron.core.overrides import overridable

Window = tuple[int, int]


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
) -> Tensor:
    """``dropout(softmax(hide(scale * Q K^T))) V`` for every head.

    Args:
        query: [sq, b, n*d] for layout SBH, [b, sq, n*d] for BSH, [b, n, sq, d] for BNSD.
        key: [sk, b, g*d], [b, sk, g*d] or [b, g, sk, d]; query head j uses group ``j // (n/g)``.
        value: as ``key``, possibly with another width per head.
        num_heads: n.
        num_query_groups: g, a divisor of n.
        layout: ``"SBH"``, ``"BSH"`` or ``"BNSD"``, of operands and result.
        causal: hide keys after the query. The last query sits at the last key when lengths differ.
        window: (left, right): query i sees keys i-left..i+right only; -1 for no limit.
        attention_mask: bool [b or 1, 1, sq, sk], True hides; hides in addition to the two above.
        softmax_scale: factor in front of the scores.
        dropout_p: probability of dropping an attention weight, drawn from the current random stream.

    Returns:
        [sq, b, n*dv], [b, sq, n*dv] or [b, n, sq, dv], in the dtype of ``query``.
    """
    q, k, v = (
        split_heads(t, heads, layout)
        for t, heads in ((query, num_heads), (key, num_query_groups), (value, num_query_groups))
    )
    compute = accelerator.matmul_compute_dtype(query.dtype, query.device)
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    sizes = (q.shape[2], k.shape[2])
    if drops_by_lanes(dropout_p) and not accelerator.draws_in_parallel(q.device):
        hidden = hidden_keys(*sizes, causal, window, attention_mask, q.device)
        shape = AttentionShape(hidden, causal, softmax_scale, dropout_p)
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

    None where ``is_causal`` (or nothing) says all there is to say, so that a kernel can skip hidden blocks.
    """
    if window is not None and covers(window, sq, sk, causal):
        window = None
    if attention_mask is None and window is None and (not causal or sq == sk):
        return None
    return ~hidden_keys(sq, sk, causal, window, attention_mask, device)


def hidden_keys(
    sq: int,
    sk: int,
    causal: bool,
    window: Window | None,
    attention_mask: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Bool mask [b or 1, 1, sq, sk], True where a key is hidden; None if nothing is."""
    if window is not None and covers(window, sq, sk, causal):
        window = None
    if not causal and window is None:
        return attention_mask
    # [sq, sk] -> [1, 1, sq, sk]
    band = band_mask(sq, sk, window, causal, device)[None, None]
    return band if attention_mask is None else band | attention_mask
