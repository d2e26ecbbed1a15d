"""Flash attention over packed sequences."""

import itertools
from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.fused_attention import Window
from megatron_npu import chip
from megatron_npu.core.fusions.attention_hiding import hiding_in_packed_rows
from megatron_npu.core.fusions.fused_attention import WIDEST_HEAD, why_not_shape
from megatron_npu.registry import replaces

_MOST_SEQUENCES = 1024


def _unsuitable(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_ends: list[int],
    key_ends: list[int],
    dropout_p: float,
    **_: Any,
) -> str | None:
    if len(query_ends) > _MOST_SEQUENCES:
        return f"more than {_MOST_SEQUENCES} sequences"
    lengths = zip(
        *([b - a for a, b in itertools.pairwise([0, *ends])] for ends in (query_ends, key_ends)), strict=True
    )
    if any(queries > keys for queries, keys in lengths):
        return "sequences with more queries than keys"
    return why_not_shape(query.shape[1], query.shape[-1], value.shape[-1], dropout_p)


@replaces(
    "megatron.core.fusions.packed_attention.packed_attention",
    operators=("npu_fusion_attention",),
    since="5.0.rc3",
    chips=chip.FROM_910B,
    unless=_unsuitable,
    limits=f"heads wider than {WIDEST_HEAD}, values wider than keys, over {_MOST_SEQUENCES} sequences, "
    "sequences with more queries than keys",
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
        **hiding_in_packed_rows(causal, window, query.device),
    )[0]
