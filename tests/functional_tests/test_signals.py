"""Signals to whole jobs, process groups and single ranks, at any moment: a checkpoint, or a line that says why not."""

import signal
import sys
from pathlib import Path

import pytest

from tests.functional_tests.signal_trials import Bench, Trial, seeded, try_out

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def bench(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(golden, tmp_path_factory.mktemp("bench"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_a_seeded_signal(bench: Bench, tmp_path: Path, seed: int):
    trial = seeded(seed)
    print(trial)
    print(f"ended after {try_out(trial, bench, tmp_path):.1f} s")
