"""``--profile``: whose profiler is used, for how many steps, and that torch's writes a trace."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron.core import accelerator
from megatron.training.step_hooks import StepHooks

ARGS = Namespace(
    profile=True,
    profile_step_start=1,
    profile_step_end=3,
    profile_ranks=[0],
    use_pytorch_profiler=False,
    rank=0,
    save=None,
    manual_gc=False,
    train_sync_interval=None,
    check_weight_hash_across_dp_replicas_interval=None,
    log_straggler=False,
)


class Recorder:
    """A profiler of a device's own."""

    def __init__(self, directory: str, steps: int):
        self.calls = [(directory, steps)]

    def start(self) -> None:
        self.calls.append("start")

    def step(self) -> None:
        self.calls.append("step")

    def stop(self) -> None:
        self.calls.append("stop")


def train(args: Namespace, steps: int = 5) -> None:
    with StepHooks(args, [], 0) as hooks:
        for iteration in range(steps):
            hooks.before_step(iteration)
            torch.ones(3) @ torch.ones(3)
            hooks.after_step(iteration + 1)


def traces(directory: Path) -> list[Path]:
    return list(directory.glob("*.pt.trace.json"))


def test_torchs_profiler_writes_a_trace(tmp_path: Path) -> None:
    train(Namespace(**vars(ARGS), tensorboard_dir=str(tmp_path)))
    (trace,) = traces(tmp_path)
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == "aten::dot" for event in events) == 2


@pytest.mark.parametrize("asked_for_torchs", [False, True])
def test_the_profiler_of_the_device_is_preferred(
    monkeypatch, tmp_path: Path, capsys, asked_for_torchs: bool
) -> None:
    made = []

    def make(directory: str, steps: int) -> Recorder:
        made.append(Recorder(directory, steps))
        return made[-1]

    monkeypatch.setattr(accelerator, "companion", {"make_profiler": make}.get)
    args = Namespace(**vars(ARGS) | {"use_pytorch_profiler": asked_for_torchs}, tensorboard_dir=str(tmp_path))
    train(args)
    assert len(traces(tmp_path)) == asked_for_torchs
    if asked_for_torchs:
        assert not made and "by torch's profiler" in capsys.readouterr().out
    else:
        assert made[0].calls == [(str(tmp_path), 2), "start", "step", "step", "stop"]
        assert f"profiling iterations 1 to 3 into {tmp_path}" in capsys.readouterr().out


def test_other_ranks_are_not_profiled(tmp_path: Path) -> None:
    train(Namespace(**vars(ARGS) | {"rank": 1}, tensorboard_dir=str(tmp_path)))
    assert not traces(tmp_path)
