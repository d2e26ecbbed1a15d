"""Attention mask, loss mask and position ids of one sample of concatenated documents."""

import torch
from torch import Tensor


def causal_mask(length: int) -> Tensor:
    """bool [1, length, length]; True hides: column j from row i < j."""
    return torch.ones((1, length, length), dtype=torch.bool).triu_(1)


def document_attention_mask(is_eod: Tensor, causal: Tensor) -> Tensor:
    """Causal mask that also hides everything up to an end-of-document token from what follows it.

    Args:
        is_eod: bool [s]
        causal: bool [1, s, s]
    """
    # An end-of-document token belongs to the document it ends: count those strictly before.
    document = torch.cumsum(is_eod, dim=0) - is_eod.long()  # [s]
    return causal | (document[:, None] != document[None, :])  # [1, s, s] | [s, s] -> [1, s, s]


def document_position_ids(is_eod: Tensor) -> Tensor:
    """Positions that start from 0 again after every end-of-document token. bool [s] -> int64 [s]."""
    position = torch.arange(len(is_eod))
    start = torch.zeros_like(position)
    start[1:] = torch.where(is_eod[:-1], position[1:], 0)
    return position - torch.cummax(start, dim=0).values
