"""Which keys a query may see: bands of whole sequences and of blocks, as numbers and as boolean masks."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron.core import accelerator

# Queries of a banded block are taken this many at a time, so that keys outside their band cost nothing.
_STRIPE = 256


def covers(window: tuple[int, int], sq: int, sk: int, causal: bool) -> bool:
    """True if the window masks nothing that causality leaves visible."""
    left, right = window
    return (left < 0 or left >= sk - 1) and (causal or right < 0 or right >= sq - 1)


@functools.lru_cache(maxsize=8)
def band_mask(sq: int, sk: int, window: tuple[int, int] | None, causal: bool, device: torch.device) -> Tensor:
    """True where a key is masked.  [sq, sk], cached: do not write to it.

    Query i stands at position ``p = i + sk - sq`` and sees keys ``p - left <= j <= p + right``, and none
    after itself when ``causal``. Sides below 0 are open.
    """
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0 if right < 0 else min(right, 0)
    distance = torch.arange(sk, device=device).unsqueeze(0) - torch.arange(
        sk - sq, sk, device=device
    ).unsqueeze(1)
    masked = torch.zeros(sq, sk, dtype=torch.bool, device=device)
    if left >= 0:
        masked |= distance < -left
    if right >= 0:
        masked |= distance > right
    return masked


class Band(NamedTuple):
    """Query i of a block sees keys ``i - left <= j <= i + right``, both counted from the block's own start.

    None is no limit. Numbers may be negative: a band that lies beside the diagonal.
    """

    left: int | None = None
    right: int | None = None

    def moved(self, queries: int, keys: int) -> "Band":
        """The same band for a block that starts ``queries`` rows and ``keys`` columns further on."""
        offset = queries - keys
        return Band(
            None if self.left is None else self.left - offset,
            None if self.right is None else self.right + offset,
        )

    def trimmed(self, sq: int, sk: int) -> "Band":
        """Without the limits that mask nothing in a block of ``sq`` queries and ``sk`` keys."""
        return Band(
            None if self.left is None or self.left >= sq - 1 else self.left,
            None if self.right is None or self.right >= sk - 1 else self.right,
        )

    def masks_all(self, sq: int, sk: int) -> bool:
        """True if no query of the block sees any of its keys."""
        beyond_right = self.right is not None and self.right < 1 - sq
        beyond_left = self.left is not None and self.left < 1 - sk
        return beyond_right or beyond_left

    def is_causal(self, sq: int, sk: int) -> bool:
        """True for the plain triangle of a square block."""
        return self.left is None and self.right == 0 and sq == sk


def whole_band(sq: int, sk: int, causal: bool, window: tuple[int, int] | None) -> Band:
    """Causality and window, whose last query stands at the last key, from the upper left corner."""
    left, right = (None if side < 0 else side for side in window or (-1, -1))
    return Band(left, 0 if causal else right).moved(sk - sq, 0)


class Stripe(NamedTuple):
    """Some queries of a block, the keys that any of them may see, and the band between the two."""

    rows: slice
    keys: slice
    band: Band


def stripes(sq: int, sk: int, band: Band) -> Iterator[Stripe]:
    """Cuts a block into stripes of queries; stripes that see nothing are left out."""
    for first in range(0, sq, _STRIPE):
        last = min(first + _STRIPE, sq)
        start = 0 if band.left is None else max(0, first - band.left)
        stop = sk if band.right is None else min(sk, last + band.right)
        if start < stop:
            inner = band.moved(first, start).trimmed(last - first, stop - start)
            yield Stripe(slice(first, last), slice(start, stop), inner)


@functools.lru_cache(maxsize=32)
def masked_by_band(sq: int, sk: int, band: Band, device: torch.device) -> Tensor:
    """True where a key is masked.  [sq, sk] bool, cached: do not write to it."""
    # [1, sk] - [sq, 1] -> [sq, sk]
    distance = torch.arange(sk, device=device)[None] - torch.arange(sq, device=device)[:, None]
    masked = torch.zeros(sq, sk, dtype=torch.bool, device=device)
    if band.left is not None:
        masked = masked | (distance < -band.left)
    if band.right is not None:
        masked = masked | (distance > band.right)
    return masked


def masked_in_stripe(stripe: Stripe, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """True where the band or the mask covers a key.  [b or 1, 1, rows, keys] bool; None if nothing is masked.

    Args:
        stripe: part of the block.
        attention_mask: of the whole block, [b or 1, 1, sq, sk], True masks.
        device: where to make the band.
    """
    mask = None if attention_mask is None else attention_mask[:, :, stripe.rows, stripe.keys]
    if stripe.band == Band():
        return mask
    rows, keys = (part.stop - part.start for part in (stripe.rows, stripe.keys))
    band = masked_by_band(rows, keys, stripe.band, device)[None, None]
    return band if mask is None else band | mask


@functools.lru_cache(maxsize=32)
def get_default_causal_mask(sq: int) -> Tensor:
    """True above the diagonal, where keys are masked.  [sq, sq], bool, on the current device; cached."""
    return torch.ones(sq, sq, dtype=torch.bool, device=accelerator.current_device()).triu_(1)
