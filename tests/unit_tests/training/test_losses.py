"""Averages over micro-batches, by hand."""

import pytest
import torch

from megatron.training.losses import average_reports


def test_sum_and_count_pairs_average_over_tokens():
    reports = [
        {"lm loss": (torch.tensor(6.0), torch.tensor(3))},
        {"lm loss": (torch.tensor(10.0), torch.tensor(1))},
    ]
    assert average_reports(reports)["lm loss"].item() == pytest.approx(4.0)


def test_single_values_are_averaged_over_microbatches():
    assert average_reports([{"x": 1.0}, {"x": torch.tensor(4.0)}])["x"].item() == pytest.approx(2.5)


def test_no_report_on_inner_stages():
    assert average_reports([]) == {}


def test_batch_without_counted_tokens_gives_zero():
    reports = [{"lm loss": (torch.tensor(0.0), torch.tensor(0))}]
    assert average_reports(reports)["lm loss"].item() == 0.0
