"""Boolean masks that depend on positions only, built once per shape."""

import functools

import torch
from torch import Tensor


def covers(window: tuple[int, int], sq: int, sk: int, causal: bool) -> bool:
    """True if the window hides nothing that causality leaves visible."""
    left, right = window
    return (left < 0 or left >= sk - 1) and (causal or right < 0 or right >= sq - 1)


@functools.lru_cache(maxsize=8)
def band_mask(sq: int, sk: int, window: tuple[int, int] | None, causal: bool, device: torch.device) -> Tensor:
    """True where a key is hidden.  [sq, sk], cached: do not write to it.

    Query i stands at position ``p = i + sk - sq`` and sees keys ``p - left <= j <= p + right``, and none
    after itself when ``causal``. Sides below 0 are open.
    """
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0 if right < 0 else min(right, 0)
    distance = torch.arange(sk, device=device).unsqueeze(0) - torch.arange(
        sk - sq, sk, device=device
    ).unsqueeze(1)
    hidden = torch.zeros(sq, sk, dtype=torch.bool, device=device)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return hidden
