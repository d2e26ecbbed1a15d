"""What the schedule is handed, and what becomes of its reports: averages over micro-batches, by hand."""

from argparse import Namespace

import pytest
import torch

from megatron.core.distributed import finalize_model_grads
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.training import schedule_hooks
from megatron.training.schedule_hooks import average_reports, schedule_config


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


@pytest.mark.parametrize("aligned", [False, True])
def test_hooks_go_into_a_copy_of_the_models_config(monkeypatch: pytest.MonkeyPatch, aligned: bool):
    args = Namespace(
        overlap_grad_reduce=True,
        align_grad_reduce=aligned,
        overlap_param_gather=True,
        align_param_gather=aligned,
    )
    monkeypatch.setattr(schedule_hooks, "get_args", lambda: args)
    monkeypatch.setattr(schedule_hooks, "get_timers", lambda: "timers")
    chunks = [
        Namespace(no_sync=f"no_sync {n}", start_grad_sync=f"grads {n}", start_param_sync=f"params {n}")
        for n in range(2)
    ]
    config = ModelParallelConfig()
    before = dict(vars(config))
    found = schedule_config(config, chunks, Namespace(scale_loss="scale"))
    assert vars(config) == before
    assert (found.grad_scale_func, found.timers) == ("scale", "timers")
    assert found.no_sync_func == ["no_sync 0", "no_sync 1"]
    assert found.grad_sync_func == (["grads 0", "grads 1"] if aligned else None)
    assert found.param_sync_func == (["params 0", "params 1"] if aligned else None)
    assert found.finalize_model_grads_func is finalize_model_grads
    assert schedule_config(config, chunks[:1], Namespace(scale_loss="scale")).no_sync_func == "no_sync 0"
