"""Averaging what the loss function reported for each micro-batch."""

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
            total = torch.stack(
                [torch.as_tensor(numerator).detach().float() for numerator, _ in values]
            ).sum()
            count = torch.stack([torch.as_tensor(denominator).detach().float() for _, denominator in values])
            averages[name] = total / count.sum().clamp(min=1)
        else:
            averages[name] = torch.stack([torch.as_tensor(v).detach().float() for v in values]).mean()
    return averages
