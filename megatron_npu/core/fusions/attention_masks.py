"""What to tell the fused attention operator so that it masks exactly the keys that it should.

The operator takes a mask (True masks) and a sparse mode. Without a mask it computes everything, whatever the
mode says. Rows counted from the upper left (mode 0) or the lower right corner (modes 3 and 4) see

    mode 0   mask is False and i - pre <= j <= i + next; the mask must cover all that the window masks
    mode 1   mask is False
    mode 2   j <= i                                 compressed mask
    mode 3   j <= i + sk - sq                       compressed mask
    mode 4   i + sk - sq - pre <= j <= i + sk - sq + next   compressed mask

The compressed mask is a strictly upper triangle of 2048 x 2048 whatever the size of the scores.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.attention_masks import Band, masked_by_band

COMPRESSED = 2048
_OPEN = 2147483647
_MASKED_WINDOW, _MASKED, _LEFT_UP, _RIGHT_DOWN, _BAND = range(5)


@functools.lru_cache(maxsize=2)
def compressed_mask(device: torch.device) -> Tensor:
    """The one pattern that compressed modes accept: True above the diagonal.  [2048, 2048] bool, cached."""
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu_(1)


def mask_arguments(
    sq: int, sk: int, band: Band, attention_mask: Tensor | None, device: torch.device
) -> dict[str, Any]:
    """Keywords of the operator for scores of ``sq`` queries and ``sk`` keys.

    Args:
        sq, sk: sizes.
        band: visible keys of each query, counted from the upper left corner.
        attention_mask: bool [b or 1, 1, sq, sk], True masks in addition; or None.
        device: of the operands.
    """
    band = band.trimmed(sq, sk)
    if attention_mask is not None:
        # A row may be masked as a whole; this precision makes its result 0 instead of undefined.
        return _with_mask(sq, sk, band, attention_mask, device) | {"inner_precise": 2}
    if band == Band():
        return {}
    if max(sq, sk) <= COMPRESSED or not _is_window(band, sq, sk):
        return _with_mask(sq, sk, band, None, device)
    return _compressed(sq, sk, band, device)


def mask_arguments_of_packed_rows(
    causal: bool, window: tuple[int, int] | None, device: torch.device
) -> dict[str, Any]:
    """Keywords for packed sequences: the mode counts from the lower right corner of each.

    Args:
        causal: mask keys after the query.
        window: (left, right) around a query that sits at its sequence's last keys; below 0 is open.
        device: of the operands.
    """
    left, right = (None if side < 0 else side for side in window or (-1, -1))
    right = 0 if causal else right
    if left is None and right is None:
        return {}
    if left is None and right == 0:
        return {"atten_mask": compressed_mask(device), "sparse_mode": _RIGHT_DOWN}
    return {"atten_mask": compressed_mask(device), "sparse_mode": _BAND, **_limits(left, right)}


def empty_rows(sq: int, sk: int, band: Band) -> bool:
    """True if the band leaves some query without any key."""
    right_of_all = band.left is not None and sq - 1 - band.left > sk - 1
    left_of_all = band.right is not None and band.right < 0
    return right_of_all or left_of_all


def _with_mask(
    sq: int, sk: int, band: Band, attention_mask: Tensor | None, device: torch.device
) -> dict[str, Any]:
    if band == Band():
        return {"atten_mask": attention_mask, "sparse_mode": _MASKED}
    masked = masked_by_band(sq, sk, band, device)
    if attention_mask is not None:
        masked = masked | attention_mask
    if not _is_window(band, sq, sk):
        return {"atten_mask": masked, "sparse_mode": _MASKED}
    # The window lets the operator skip blocks that are masked anyway.
    return {"atten_mask": masked, "sparse_mode": _MASKED_WINDOW, **_limits(band.left, band.right)}


def _compressed(sq: int, sk: int, band: Band, device: torch.device) -> dict[str, Any]:
    mask, shift = compressed_mask(device), sk - sq
    if band == Band(None, 0):
        return {"atten_mask": mask, "sparse_mode": _LEFT_UP}
    if band == Band(None, shift) and shift > 0:
        return {"atten_mask": mask, "sparse_mode": _RIGHT_DOWN}
    left = None if band.left is None else band.left + shift
    right = None if band.right is None else band.right - shift
    return {"atten_mask": mask, "sparse_mode": _BAND, **_limits(left, right)}


def _limits(left: int | None, right: int | None) -> dict[str, int]:
    return {
        "pre_tockens": _OPEN if left is None else left,
        "next_tockens": _OPEN if right is None else right,
    }


def _is_window(band: Band, sq: int, sk: int) -> bool:
    """Whether the operator accepts the band as two numbers: it must meet the scores."""
    left, right = (_OPEN if side is None else side for side in band)
    if right < 0 and not (left >= -right and -right < sk):
        return False
    return left >= 0 or (right >= -left and -left < sq)
