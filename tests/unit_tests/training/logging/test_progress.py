"""progress.txt: what a job, and all jobs of a series, have done so far."""

import re
from argparse import Namespace
from datetime import datetime, timedelta

import pytest

from megatron.training import utils
from megatron.training.logging import progress

NOW = datetime(2026, 1, 2, 12, 0, 0)


class Clock(datetime):
    @classmethod
    def now(cls):
        return NOW


@pytest.fixture
def args(tmp_path, monkeypatch):
    args = Namespace(
        save=str(tmp_path), world_size=1, log_progress=True, seq_length=1000, consumed_train_samples=50,
        process_start_time=(NOW - timedelta(seconds=100)).timestamp(),
        num_floating_point_operations_at_start=6e14,
    )  # fmt: skip
    monkeypatch.setattr(utils, "get_args", lambda: args)
    monkeypatch.setattr(progress, "datetime", Clock)
    return args


def write(path, *events):
    lines = [f"{time:%Y-%m-%d %H:%M:%S}\tJob ID: \t# GPUs: {gpus}\t{text}" for time, gpus, text in events]
    (path / "progress.txt").write_text("".join(line + "\n" for line in lines))


def saved(operations):
    return f"Saved checkpoint\tIteration: 5\tFloating-point operations: {operations:.2e}\tTokens: 1"


def figures(tmp_path):
    last = (tmp_path / "progress.txt").read_text().splitlines()[-1]
    return dict(field.split(": ") for field in last.split("\t")[4:])


def test_progress_gives_throughput_of_the_job_and_of_the_series(args, tmp_path):
    hours = [NOW - timedelta(seconds=s) for s in (1000, 600, 400, 300, 100)]
    write(
        tmp_path,
        (hours[0], 8, "Starting job"),
        (hours[1], 8, saved(2e14)),
        (hours[2], 1, "Starting job"),  # on one device: a new series, after 2e14 operations
        (hours[3], 1, saved(6e14)),
        (hours[4], 1, "Starting job"),
    )
    progress.append_checkpoint_line(args, 9, 8e14)
    found = figures(tmp_path)
    assert found["Iteration"] == "9"
    assert found["Job throughput"] == "2.0 TFLOP/s/GPU"  # (8 - 6) e14 in 100 s
    assert found["Cumulative throughput"] == "1.5 TFLOP/s/GPU"  # (8 - 2) e14 in 400 s
    assert found["Floating-point operations"] == "8.00e+14"
    assert found["Tokens (in billions)"] == "0.000050"


def test_first_job_of_a_directory_has_no_earlier_operations(args, tmp_path):
    args.num_floating_point_operations_at_start = 0.0
    assert progress._start_of_series(str(tmp_path), 1) == (None, 0.0)
    progress.append_start_line(args)
    progress.append_checkpoint_line(args, 1, 1e10)
    found = figures(tmp_path)
    assert found["Job throughput"] == "0.00010 TFLOP/s/GPU"
    assert re.search(r"Starting job\n.*Saved checkpoint\t", (tmp_path / "progress.txt").read_text())
