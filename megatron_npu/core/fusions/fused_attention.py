"""Flash attention, of whole and of packed sequences."""

import itertools
from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.attention_masks import whole_band
from megatron.core.fusions.fused_attention import Window
from megatron_npu import chip
from megatron_npu.core.fusions.attention_masks import (
    empty_rows,
    mask_arguments,
    mask_arguments_of_packed_rows,
)
from megatron_npu.registry import replaces

WIDEST_HEAD = 512
SOFT_CAP = "a soft cap on scores"
_MOST_HEADS = 256


def _unsuitable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    num_query_groups: int,
    layout: str = "SBH",
    causal: bool = True,
    window: Window | None = None,
    dropout_p: float = 0.0,
    softcap: float | None = None,
    **_: Any,
) -> str | None:
    if softcap is not None:
        return SOFT_CAP
    sq, sk = (_length(t, layout) for t in (query, key))
    width = query.shape[-1] // (1 if layout == "BNSD" else num_heads)
    value_width = value.shape[-1] // (1 if layout == "BNSD" else num_query_groups)
    return why_not_shape(num_heads, width, value_width, dropout_p) or (
        "queries without visible keys" if empty_rows(sq, sk, whole_band(sq, sk, causal, window)) else None
    )


def why_not_shape(heads: int, width: int, value_width: int, dropout_p: float) -> str | None:
    """Why the operator does not take such heads; None if it does."""
    if heads > _MOST_HEADS:
        return f"more than {_MOST_HEADS} heads"
    if width > WIDEST_HEAD:
        return f"heads wider than {WIDEST_HEAD}"
    if value_width > width:
        return "values wider than keys"
    return "dropout of everything" if dropout_p >= 1.0 else None


@replaces(
    "megatron.core.fusions.fused_attention.fused_attention",
    operators=("npu_fusion_attention",),
    since="5.0.rc3",
    chips=chip.FROM_910B,
    unless=_unsuitable,
    limits=f"heads wider than {WIDEST_HEAD}, values wider than keys, queries without visible keys, "
    "a soft cap",
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
)
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
    """Keys and values of fewer groups than heads go in as they are; layouts are the operator's own.

    Dropout draws from the NPU's default generator, and backward draws the same mask again.
    """
    sq, sk = (_length(t, layout) for t in (query, key))
    band = whole_band(sq, sk, causal, window)
    return torch.ops.npu.npu_fusion_attention(
        query,
        key,
        value,
        num_heads,
        layout,
        scale=softmax_scale,
        keep_prob=1.0 - dropout_p,
        **mask_arguments(sq, sk, band, attention_mask, query.device),
    )[0]


def _length(t: Tensor, layout: str) -> int:
    return t.shape[{"SBH": 0, "BSH": 1, "BNSD": 2}[layout]]


_MOST_SEQUENCES = 1024


def _unsuitable_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_ends: list[int],
    key_ends: list[int],
    dropout_p: float,
    softcap: float | None = None,
    **_: Any,
) -> str | None:
    if softcap is not None:
        return SOFT_CAP
    if len(query_ends) > _MOST_SEQUENCES:
        return f"more than {_MOST_SEQUENCES} sequences"
    lengths = zip(
        *([b - a for a, b in itertools.pairwise([0, *ends])] for ends in (query_ends, key_ends)), strict=True
    )
    if any(queries > keys for queries, keys in lengths):
        return "sequences with more queries than keys"
    return why_not_shape(query.shape[1], query.shape[-1], value.shape[-1], dropout_p)


@replaces(
    "megatron.core.fusions.fused_attention.packed_attention",
    operators=("npu_fusion_attention",),
    since="5.0.rc3",
    chips=chip.FROM_910B,
    unless=_unsuitable_packed,
    limits=f"heads wider than {WIDEST_HEAD}, values wider than keys, over {_MOST_SEQUENCES} sequences, "
    "sequences with more queries than keys, a soft cap",
    bound={torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2},
)
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
    """One call for all sequences: layout TND, with the ends as lists on the host."""
    return torch.ops.npu.npu_fusion_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        query.shape[1],
        "TND",
        scale=softmax_scale,
        keep_prob=1.0 - dropout_p,
        actual_seq_qlen=query_ends,
        actual_seq_kvlen=key_ends,
        **mask_arguments_of_packed_rows(causal, window, query.device),
    )[0]
