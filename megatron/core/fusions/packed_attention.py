"""Attention within each of the sequences that lie one after the other in a packed row."""

import itertools

import torch
from torch import Tensor

from megatron.core.fusions.fused_attention import Window, fused_attention
from megatron.core.overrides import overridable


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
) -> Tensor:
    """``dropout(softmax(hide(scale * Q K^T))) V`` of every head, sequence by sequence.

    Args:
        query: [t, n, d].
        key: [u, g, d]; query head j uses group ``j // (n/g)``.
        value: [u, g, dv].
        query_ends: where each sequence ends among the queries, ascending, the last one t; on the host.
        key_ends: the same among the keys, the last one u.
        causal: hide keys after the query. The last query of a sequence sits at its last key.
        window: (left, right) as in ``fused_attention``.
        softmax_scale: factor in front of the scores.
        dropout_p: probability of dropping an attention weight.

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
        )
        for rows, keys in spans
        if rows.stop > rows.start
    ]
    return torch.cat(parts).view(query.shape[0], query.shape[1], value.shape[-1])


def _spans(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
