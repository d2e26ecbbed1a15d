"""Calls of attention: whole sequences, blocks of a ring, and the merging of blocks."""

import math
from typing import Any

import torch
from torch import Tensor

from megatron.core import overrides
from megatron.core.fusions.attention_masks import Band
from megatron.core.fusions.block_attention import NOTHING_VISIBLE
from megatron_npu.checking.case import Call, Case, Draw

_WHOLE = "megatron.core.fusions.fused_attention.fused_attention"
_PACKED = "megatron.core.fusions.fused_attention.packed_attention"
_BLOCK = "megatron.core.fusions.block_attention."


def _operand(draw: Draw, s: int, b: int, heads: int, d: int, layout: str) -> Tensor:
    shape = {"SBH": (s, b, heads * d), "BSH": (b, s, heads * d), "BNSD": (b, heads, s, d)}[layout]
    return draw.normal(*shape)


def _whole(
    layout: str = "SBH",
    sq: int = 24,
    sk: int | None = None,
    heads: int = 4,
    groups: int = 4,
    batch: int = 2,
    value_width: int = 16,
    masks: int = 0,
    fully_masked: bool = False,
    **keywords: Any,
) -> Any:
    def make(draw: Draw) -> Call:
        keys, width = sk or sq, 16
        mask = None
        if masks:
            mask = draw.masked(masks, 1, sq, keys)
            mask[..., 0] = False
            mask[:, :, 3] |= fully_masked
        operands = (
            _operand(draw, sq, batch, heads, width, layout),
            _operand(draw, keys, batch, groups, width, layout),
            _operand(draw, keys, batch, groups, value_width, layout),
        )
        fixed = dict(num_heads=heads, num_query_groups=groups, layout=layout, softmax_scale=0.25)
        return Call(operands, fixed | {"attention_mask": mask} | keywords, wanted=(0, 1, 2))

    return make


_FEW: dict[str, Any] = dict(batch=1, heads=2, groups=2)
_LONG: dict[str, Any] = dict(sq=2112, **_FEW)  # beyond the compressed mask
_LONG_ONE_GROUP: dict[str, Any] = _LONG | {"groups": 1}
_WHOLE_CASES = {
    **{f"causal {layout}": _whole(layout) for layout in ("SBH", "BSH", "BNSD")},
    **{
        f"causal {layout}, 2 groups of 4 heads": _whole(layout, groups=2) for layout in ("SBH", "BSH", "BNSD")
    },
    "not causal": _whole(causal=False),
    "one group": _whole(groups=1),
    "values narrower than keys": _whole(value_width=8),
    "fewer queries than keys": _whole(sq=16, sk=24),
    "fewer keys, not causal": _whole(sq=24, sk=16, causal=False),
    "window 5 back": _whole(window=(5, 0)),
    "window 5 back BSH, 2 groups": _whole("BSH", groups=2, window=(5, 0)),
    "window 5 back, 3 ahead, not causal": _whole(causal=False, window=(5, 3)),
    "window 3 ahead only, not causal": _whole(causal=False, window=(-1, 3)),
    "window and fewer queries than keys": _whole(sq=16, sk=24, window=(5, 0)),
    "mask over causal": _whole(masks=1),
    "a mask each, over a window": _whole("BSH", masks=2, window=(7, 0)),
    "mask, not causal, fewer queries": _whole(sq=16, sk=24, causal=False, masks=2),
    "mask with a fully masked query": _whole(causal=False, masks=1, fully_masked=True),
    "long causal": _whole(**_LONG),
    "long causal, fewer queries": _whole(sq=2080, sk=2112, **_FEW),
    "long window 64 back SBH": _whole(**_LONG, window=(64, 0)),
    "long window 64 back BSH, one group": _whole("BSH", **_LONG_ONE_GROUP, window=(64, 0)),
    "long window, fewer queries": _whole(sq=64, sk=2304, **_FEW, window=(64, 0)),
}

_SOME_TYPES = (torch.float32, torch.bfloat16)


def _packed(
    causal: bool = True, window: tuple[int, int] | None = None, groups: int = 2, ends: tuple = (5, 6, 6, 24),
    key_ends: tuple = (), value_width: int = 16,
) -> Any:  # fmt: skip
    """Sequences of 5, 1, 0 and 18 tokens."""

    def make(draw: Draw) -> Call:
        keys = list(key_ends or ends)
        operands = (
            draw.normal(ends[-1], 4, 16),
            draw.normal(keys[-1], groups, 16),
            draw.normal(keys[-1], groups, value_width),
        )
        fixed = dict(query_ends=list(ends), key_ends=keys, causal=causal, window=window)
        return Call(operands, fixed | dict(softmax_scale=0.25, dropout_p=0.0), wanted=(0, 1, 2))

    return make


_PACKED_CASES = {
    "causal, 2 groups": _packed(),
    "causal, as many groups as heads": _packed(groups=4),
    "not causal": _packed(causal=False),
    "window 3 back": _packed(window=(3, 0)),
    "window 3 back, 2 ahead, not causal": _packed(causal=False, window=(3, 2)),
    "more keys than queries": _packed(ends=(4, 9), key_ends=(6, 20)),
    "values narrower than keys": _packed(value_width=8),
    "one beyond the compressed mask": _packed(window=(64, 0), ends=(40, 2150)),
}

# Blocks of a ring: whole, causal, beside the diagonal, beyond a window, and with rows that see nothing.
_BANDS = {
    "whole": Band(),
    "triangle": Band(None, 0),
    "strict triangle, first row fully masked": Band(None, -1),
    "window": Band(4, 0),
    "tail of a window, last rows fully masked": Band(-4, None),
    "band beside the diagonal": Band(9, -3),
}


def _block_operands(draw: Draw, sq: int = 12, sk: int = 16, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return draw.normal(sq, 2, 4, 16), draw.normal(sk, 2, groups, 16), draw.normal(sk, 2, groups, 16)


def _keywords(draw: Draw, band: Band, masks: int, sq: int, sk: int) -> dict[str, Any]:
    mask = draw.masked(masks, 1, sq, sk) if masks else None
    return dict(band=band, attention_mask=mask, softmax_scale=0.25, dropout_p=0.0, dropout_seed=0)


def _block(band: Band, masks: int = 0, sq: int = 12, sk: int = 16) -> Any:
    return lambda draw: Call(_block_operands(draw, sq, sk), _keywords(draw, band, masks, sq, sk))


def _block_backward(band: Band, masks: int = 0, sq: int = 12, sk: int = 16) -> Any:
    """Gradients of a block whose queries also attend to another block."""

    def make(draw: Draw) -> Call:
        operands = _block_operands(draw, sq, sk)
        keywords = _keywords(draw, band, masks, sq, sk)
        forward = overrides.default_of(_BLOCK + "block_attention")
        out, lse = forward(*operands, **keywords)
        other = (draw.normal(*out.shape), draw.normal(*lse.shape) + math.log(sk))
        out, lse = overrides.default_of(_BLOCK + "merge_attention")(out.double(), lse.double(), *other)
        return Call((draw.normal(*out.shape), *operands, out, lse.float()), keywords)

    return make


def _merge(draw: Draw) -> Call:
    (out, lse), (block_out, block_lse) = (
        (draw.normal(9, 2, 4, 16), 4.0 * draw.normal(2, 4, 9)) for _ in range(2)
    )
    lse[0, 0, 0] = block_lse[1, 1, 1] = block_lse[0, 0, 0] = NOTHING_VISIBLE
    out[0, 0, 0] = block_out[1, 1, 1] = block_out[0, 0, 0] = 0.0
    return Call((out.float(), lse.float(), block_out.float(), block_lse.float()))


def _with_fully_masked_rows_flagged(result: Any, call: Call) -> list[Tensor]:
    """A fully masked query has a log-sum-exp far below all others: it is compared as a flag beside them."""
    out, lse = result
    fully_masked = lse < NOTHING_VISIBLE / 2
    return [out, lse.masked_fill(fully_masked, 0.0), fully_masked.to(torch.float32)]


ATTENTION_CASES: list[Case] = [
    *(
        Case(_WHOLE, name, make, dtypes=_SOME_TYPES if name.startswith("long") else None)
        for name, make in _WHOLE_CASES.items()
    ),
    *(
        Case(_PACKED, name, make, dtypes=_SOME_TYPES if "beyond" in name else None)
        for name, make in _PACKED_CASES.items()
    ),
    *(
        Case(_BLOCK + "block_attention", n, _block(b), _with_fully_masked_rows_flagged)
        for n, b in _BANDS.items()
    ),
    Case(
        _BLOCK + "block_attention",
        "masked triangle",
        _block(Band(None, 0), 2),
        _with_fully_masked_rows_flagged,
    ),
    Case(_BLOCK + "block_attention", "masked", _block(Band(), 1), _with_fully_masked_rows_flagged),
    Case(
        _BLOCK + "block_attention",
        "long triangle",
        _block(Band(None, 0), 0, 2080, 2080),
        _with_fully_masked_rows_flagged,
        dtypes=_SOME_TYPES,
    ),
    Case(
        _BLOCK + "block_attention",
        "long window",
        _block(Band(70, 3), 0, 2080, 2112),
        _with_fully_masked_rows_flagged,
        dtypes=_SOME_TYPES,
    ),
    *(Case(_BLOCK + "block_attention_backward", n, _block_backward(b)) for n, b in _BANDS.items()),
    Case(_BLOCK + "block_attention_backward", "masked triangle", _block_backward(Band(None, 0), 2)),
    Case(
        _BLOCK + "block_attention_backward",
        "long window",
        _block_backward(Band(70, 3), 0, 2080, 2112),
        dtypes=_SOME_TYPES,
    ),
    Case(_BLOCK + "merge_attention", "with fully masked parts", _merge, _with_fully_masked_rows_flagged),
]
