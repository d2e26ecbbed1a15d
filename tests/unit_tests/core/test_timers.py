"""Timers and the formats of their report."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.core import timers as timers_module
from megatron.core.errors import ConfigError
from megatron.core.timers import DummyTimer, Timers


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that tests set, in seconds."""
    now = [100.0]
    monkeypatch.setattr(timers_module.time, "perf_counter", lambda: now[0])
    return now


def run(timers: Timers, name: str, seconds: float, clock: list[float], log_level: int = 0) -> None:
    timers(name, log_level=log_level).start()
    clock[0] += seconds
    timers(name).stop()


@pytest.mark.parametrize(
    ("option", "report"),
    [
        (
            "minmax",
            "(min, max) time across ranks (ms):\n"
            "    forward-backward ...............................: (1250.00, 1250.00)\n"
            "    optimizer ......................................: (10.13, 10.13)",
        ),
        (
            "max",
            "max time across ranks (ms):\n"
            "    forward-backward ...............................: 1250.00\n"
            "    optimizer ......................................: 10.13",
        ),
        (
            "all",
            "times across ranks (ms):\n"
            "  forward-backward:\n     rank  0: 1250.00\n"
            "  optimizer:\n     rank  0: 10.13",
        ),
    ],
)
def test_report_has_the_format_of_its_option(
    option: str, report: str, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    timers = Timers(0, option)
    run(timers, "forward-backward", 2.5, clock)
    run(timers, "optimizer", 0.020256, clock)
    timers("never-started", log_level=0)
    timers.log(["forward-backward", "unknown", "never-started", "optimizer"], normalizer=2.0)
    assert capsys.readouterr().out == report + "\n"
    # The report has set the timers to zero, so that there is nothing left to say.
    timers.log(["forward-backward", "optimizer"])
    assert capsys.readouterr().out == ""


def test_log_prints_on_one_rank_only(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    timers = Timers(0, "max")
    run(timers, "a", 1.0, clock)
    timers.log(["a"], rank=1)
    assert capsys.readouterr().out == ""


def test_elapsed_keeps_a_running_timer_running(clock: list[float]) -> None:
    timer = Timers(0, "max")("interval-time", log_level=0)
    timer.start()
    clock[0] += 2.0
    assert timer.elapsed(reset=False) == 2.0
    clock[0] += 1.0
    assert timer.elapsed() == 3.0
    clock[0] += 5.0
    timer.stop()
    assert timer.elapsed() == 5.0
    assert timer.elapsed() == 0.0
    assert timer.active_time() == 8.0


def test_level_decides_what_is_measured(clock: list[float]) -> None:
    timers = Timers(1, "minmax")
    run(timers, "zero", 1.0, clock, log_level=0)
    run(timers, "one", 1.0, clock, log_level=1)
    run(timers, "two", 1.0, clock, log_level=2)
    timers("unleveled").start()  # level 2
    assert isinstance(timers("two"), DummyTimer)
    assert isinstance(timers("unleveled"), DummyTimer)
    report = timers.get_all_timers_string()
    assert "zero" in report
    assert "one" in report
    assert "two" not in report


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Timers(3, "minmax"),
        lambda: Timers(0, "mean"),
        lambda: Timers(2, "max")("a", log_level=3),
        lambda: Timers(2, "max").get_all_timers_string(normalizer=0.0),
    ],
)
def test_wrong_settings(wrong: object) -> None:
    with pytest.raises(ConfigError):
        wrong()


def test_a_timer_has_one_level() -> None:
    timers = Timers(2, "max")
    timers("a", log_level=1)
    timers("a")
    with pytest.raises(ConfigError, match="has level 1"):
        timers("a", log_level=2)


def test_start_and_stop_alternate() -> None:
    timer = Timers(2, "max")("a")
    with pytest.raises(RuntimeError, match="not running"):
        timer.stop()
    timer.start(barrier=True)  # no process group: no barrier to take
    with pytest.raises(RuntimeError, match="running already"):
        timer.start()


def test_tensorboard(clock: list[float]) -> None:
    class Writer:
        def __init__(self) -> None:
            self.scalars: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars.append((tag, value, step))

    timers, writer = Timers(0, "minmax"), Writer()
    run(timers, "optimizer", 3.0, clock)
    timers.write(["optimizer", "absent"], writer, 7, normalizer=2.0, reset=False)
    assert writer.scalars == [("optimizer-time", 1.5, 7)]
    assert re.search(r": \(3000\.00, 3000\.00\)$", timers.get_all_timers_string())


def test_timer_measures_real_time() -> None:
    timer = Timers(0, "max")("a", log_level=0)
    began = time.perf_counter()
    timer.start()
    time.sleep(0.02)
    timer.stop()
    assert 0.02 <= timer.elapsed() <= time.perf_counter() - began


RANK_SCRIPT = """
import sys, time
import torch.distributed as dist
from megatron.core.timers import Timers

rank, path, option = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
timers = Timers(1, option)
for name in ("both", "rank-1-only")[: rank + 1]:
    timers(name, log_level=1).start(barrier=name == "both")
    time.sleep(0.05 * (rank + 1))
    timers(name).stop()
timers.log(["both", "rank-1-only"])
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "pattern"),
    [
        (
            "minmax",
            r"\(min, max\) time across ranks \(ms\):\n    both \.+: \((\d+\.\d\d), (\d+\.\d\d)\)\n"
            r"    rank-1-only \.+: \((0\.00), (\d+\.\d\d)\)\n",
        ),
        (
            "all",
            r"times across ranks \(ms\):\n  both:\n     rank  0: (\d+\.\d\d)\n     rank  1: (\d+\.\d\d)\n"
            r"  rank-1-only:\n     rank  0: (0\.00)\n     rank  1: (\d+\.\d\d)\n",
        ),
    ],
)
def test_two_ranks(option: str, pattern: str, tmp_path: Path, repo_root: Path) -> None:
    """The last rank alone prints, with the times of both."""
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_SCRIPT, str(rank), str(tmp_path / "store"), option],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        first, last = (process.communicate(timeout=300)[0] for process in ranks)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert first == ""
    # The least that the ranks have slept; a loaded machine wakes them later.
    least_ms = (50, 100, 0, 100)
    assert (found := re.fullmatch(pattern, last)), last
    assert all(float(ms) >= least for ms, least in zip(found.groups(), least_ms, strict=True)), last


def test_report_over_ranks(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    timers = Timers(0, "minmax")
    run(timers, "optimizer", 3.0, clock)
    monkeypatch.setattr(timers_module, "_gather", lambda own: [own, [2 * seconds for seconds in own]])
    assert timers.get_all_timers_string(reset=False).endswith(": (3000.00, 6000.00)")
    timers._log_option = "all"
    assert timers.get_all_timers_string().endswith("\n     rank  0: 3000.00\n     rank  1: 6000.00")


@pytest.mark.parametrize(
    ("option", "ranks", "written"),
    [
        ("all", 2, [("a-time/rank0", 1.5, 7), ("a-time/rank1", 3.0, 7)]),
        ("all", 1, [("a-time", 1.5, 7)]),
        ("minmax", 2, [("a-time", 3.0, 7)]),
    ],
)
def test_tensorboard_over_ranks(option, ranks, written, clock, monkeypatch) -> None:
    timers, scalars = Timers(0, option), []
    monkeypatch.setattr(
        timers_module, "_gather", lambda own: [[n * s for s in own] for n in range(1, ranks + 1)]
    )
    run(timers, "a", 3.0, clock)
    timers.write(["a"], None, 7, reset=False)
    timers.write(["a"], SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar)), 7, normalizer=2.0)
    assert scalars == written
    timers.write(["a"], SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar)), 8)
    assert scalars == written  # nothing was measured since


def test_a_timer_that_is_not_measured_says_nothing() -> None:
    timer = DummyTimer()
    timer.start()
    timer.stop()
    timer.reset()
    assert (timer.elapsed(), timer.active_time()) == (0.0, 0.0)
