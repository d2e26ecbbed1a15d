"""Attention to blocks of keys, for ring attention.

The operator reports the largest score and the sum of exponentials relative to it, eight times over. Here a
part is described by their log-sum-exp; handed back as a maximum with the sum 1 it means the same.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.attention_masks import Band, masked_by_band
from megatron.core.fusions.block_attention import NOTHING_VISIBLE
from megatron_npu import chip
from megatron_npu.core.fusions.attention_masks import empty_rows, mask_arguments
from megatron_npu.core.fusions.fused_attention import SOFT_CAP, WIDEST_HEAD, why_not_shape
from megatron_npu.registry import replaces

_LIMITS = f"dropout, a soft cap, heads wider than {WIDEST_HEAD}, values wider than keys"
_BOUND = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
_COPIES = 8


def _unsuitable(
    query: Tensor, key: Tensor, value: Tensor, *, dropout_p: float, softcap: float | None = None, **_: Any
) -> str | None:
    if softcap is not None:
        return SOFT_CAP
    if dropout_p > 0.0:
        # The mask must be a function of a seed given here; the operator draws from a generator.
        return "dropout"
    return why_not_shape(query.shape[2], query.shape[-1], value.shape[-1], 0.0)


def _unsuitable_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor, **settings: Any
) -> str | None:
    return _unsuitable(query, key, value, **settings)


@replaces(
    "megatron.core.fusions.block_attention.block_attention",
    operators=("npu_fusion_attention",),
    since="5.0.rc3",
    chips=chip.FROM_910B,
    unless=_unsuitable,
    limits=_LIMITS,
    bound=_BOUND,
)
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
    """[s, b, n, d] without its last border is the operator's SBH."""
    sq, sk, heads = query.shape[0], key.shape[0], query.shape[2]
    out, largest, total, *_ = torch.ops.npu.npu_fusion_attention(
        _flat(query), _flat(key), _flat(value), heads, "SBH", scale=softmax_scale,
        **_mask_arguments(sq, sk, band, attention_mask, query.device),
    )  # fmt: skip
    out = out.unflatten(-1, (heads, -1))
    lse = largest[..., 0] + total[..., 0].log()
    fully_masked = _rows_without_keys(sq, sk, band, attention_mask, query.device)
    if fully_masked is None:
        return out, lse
    # [b or 1, 1, sq] -> [sq, b or 1, 1, 1]
    out = out.masked_fill(fully_masked.permute(2, 0, 1).unsqueeze(-1), 0.0)
    return out, lse.masked_fill(fully_masked, NOTHING_VISIBLE)


@replaces(
    "megatron.core.fusions.block_attention.block_attention_backward",
    operators=("npu_fusion_attention_grad",),
    since="5.0.rc3",
    chips=chip.FROM_910B,
    unless=_unsuitable_backward,
    limits=_LIMITS,
    bound=_BOUND,
)
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
    """The operator's own backward, told the log-sum-exp of the whole sequence instead of this block's."""
    sq, sk, heads = query.shape[0], key.shape[0], query.shape[2]
    dtype = query.dtype
    # A query that sees nothing anywhere: any finite number keeps exp(score - lse) finite.
    largest = _repeated(lse.masked_fill(lse <= NOTHING_VISIBLE / 2, 0.0).float())
    dq, dk, dv, *_ = torch.ops.npu.npu_fusion_attention_grad(
        _flat(query), _flat(key), _flat(value), _flat(grad_out.to(dtype)), heads, "SBH",
        softmax_max=largest, softmax_sum=torch.ones_like(largest), attention_in=_flat(out.to(dtype)),
        scale_value=softmax_scale, **_mask_arguments(sq, sk, band, attention_mask, query.device),
    )  # fmt: skip
    return dq.view(query.shape), dk.view(key.shape), dv.view(value.shape)


@replaces(
    "megatron.core.fusions.block_attention.merge_attention",
    operators=("npu_ring_attention_update",),
    since="26.1.0",
    chips=chip.FROM_910B,
    dtypes=(torch.float32,),
    bound={torch.float32: 1e-5},
)
def merge_attention(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Both parts enter with their log-sum-exp as maximum and the sum 1."""
    first, second = _repeated(lse), _repeated(block_lse.to(lse.dtype))
    merged, largest, total = torch.ops.npu.npu_ring_attention_update(
        _flat(out), first, torch.ones_like(first), _flat(block_out.to(out.dtype)), second,
        torch.ones_like(second), input_layout="SBH",
    )  # fmt: skip
    return merged.view(out.shape), largest[..., 0] + total[..., 0].log()


def _flat(t: Tensor) -> Tensor:
    """[s, b, n, d] -> [s, b, n*d] in one piece."""
    return t.flatten(2).contiguous()


def _repeated(t: Tensor) -> Tensor:
    """[b, n, s] -> [b, n, s, 8], as the operator keeps its statistics."""
    return t.unsqueeze(-1).expand(*t.shape, _COPIES).contiguous()


def _mask_arguments(
    sq: int, sk: int, band: Band, mask: Tensor | None, device: torch.device
) -> dict[str, Any]:
    keywords = mask_arguments(sq, sk, band, mask, device)
    return keywords | {"inner_precise": 2} if empty_rows(sq, sk, band) else keywords


def _rows_without_keys(
    sq: int, sk: int, band: Band, attention_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """True for queries that see nothing of this block, [b or 1, 1, sq]; None if there can be none."""
    if attention_mask is None and not empty_rows(sq, sk, band):
        return None
    masked = masked_by_band(sq, sk, band, device)[None, None]
    return (masked if attention_mask is None else masked | attention_mask).all(-1)
