"""Cutting the rows of a matrix into blocks that suit the device."""

from collections.abc import Iterator

import torch

from megatron.core import accelerator


def row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of at least one row and otherwise at most ``accelerator.block_elements`` elements."""
    step = max(1, accelerator.block_elements(device) // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
