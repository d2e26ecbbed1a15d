"""Averaging what the loss function reported for each micro-batch."""

from collections.abc import Iterable
from typing import Any

import torch


def average_reports(reports: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One value per loss name over the micro-batches of a step.

    A (sum, count) pair is summed over micro-batches and then divided, which weighs every token the same;
    a plain number is averaged over micro-batches.

    Args:
        reports: the loss function's reports, one per micro-batch; empty on inner pipeline stages.

    Returns:
        Loss name -> 0-dim float32 tensor.
    """
    averages = {}
    for name in reports[0] if reports else ():
        values = [report[name] for report in reports]
        if isinstance(values[0], tuple | list):
            total, count = (_stack(column).sum() for column in zip(*values, strict=True))
            averages[name] = total / count.clamp(min=1)
        else:
            averages[name] = _stack(values).mean()
    return averages


def _stack(values: Iterable[Any]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(value).detach().float() for value in values])
