"""Whatever flags are mixed: a step is made, or a flag is named at once; never a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.flag_mixes import Mix, draw, fault, is_in, run_mix
from tests.distributed.pool import run_ranks

FAST = range(60)
SLOW = range(1000, 2000)
AS_PROGRAMS = (5000, 5004)


def faults_of(mix: Mix, directory: Path) -> list[str]:
    """What is wrong with a mix, run in a directory of its own."""
    place = directory / str(mix.seed)
    place.mkdir()
    try:
        outcomes = run_ranks(mix.ranks, run_mix, mix, str(place), timeout=60)
    except AssertionError as error:
        text = str(error)
        if "flag_mixes.Refused" in text and any(is_in(flag, text) for flag in mix.flags):
            return []
        return [f"{mix}\n{error}"]
    said = "".join(outcome.error for outcome in outcomes)
    found = [
        f"{mix}\nrank {rank}: {what}" for rank, o in enumerate(outcomes) if (what := fault(mix, o, said))
    ]
    if len({outcome.status for outcome in outcomes}) > 1:
        found.append(f"{mix}\nranks end with {[outcome.status for outcome in outcomes]}")
    return found


@pytest.fixture(scope="module", autouse=True)
def warm_ranks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported late is part of no mix's time."""
    for ranks in (1, 2):
        assert faults_of(Mix(ranks, ranks, ()), tmp_path_factory.mktemp("warm")) == []


@pytest.mark.parametrize("seeds", [FAST[start : start + 20] for start in FAST[::20]], ids=str)
def test_a_mix_runs_or_names_a_flag(seeds: range, tmp_path: Path) -> None:
    assert [line for seed in seeds for line in faults_of(draw(seed), tmp_path)] == []


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [SLOW[start : start + 50] for start in range(0, len(SLOW), 50)], ids=str)
def test_many_mixes_run_or_name_a_flag(seeds: range, tmp_path: Path) -> None:
    assert [line for seed in seeds for line in faults_of(draw(seed), tmp_path)] == []


@pytest.mark.parametrize("seed", AS_PROGRAMS)
def test_a_mix_of_flags_trains_in_a_process_of_its_own(seed: int, tmp_path: Path, repo_root: Path) -> None:
    mix = draw(seed)
    done = subprocess.run(
        [sys.executable, str(repo_root / "pretrain_gpt.py"), *mix.base.split(), *mix.words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repo_root), "MEGATRON_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert "Traceback" not in done.stderr, f"{mix}\n{done.stderr}"
    assert done.returncode in (0, 1, 2)
    if done.returncode:
        assert any(is_in(flag, done.stderr) for flag in mix.flags), f"{mix}\n{done.stderr}"


def test_mixes_are_drawn_from_their_seeds() -> None:
    assert draw(7) == draw(7) != draw(8)
    drawn = [draw(seed) for seed in FAST]
    assert {mix.ranks for mix in drawn} == {1, 2}
    assert len({flag for mix in drawn for flag in mix.flags}) > 200
