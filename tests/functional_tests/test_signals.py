"""Signals at any moment, to jobs, groups and single ranks: a checkpoint, or one line that says why not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.functional_tests.launcher import start_pretrain_gpt, tiny_gpt
from tests.functional_tests.signal_trials import Bench, Trial, seeded, try_out

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
HUP, INT, KILL, TERM, USR1 = (
    getattr(signal, f"SIG{name}") for name in ("HUP", "INT", "KILL", "TERM", "USR1")
)
# Layout, saves, moment, iteration, pausing rank, signals, target, resumes.
TRIALS = {
    "the group of a rank and its data workers": ("one rank", True, "training", 1, 0, (TERM,), "groups", True),
    "torchrun": ("two data", True, "training", 3, 0, (TERM,), "launcher", True),
    "torchrun is killed": ("two data", True, "training", 1, 1, (KILL,), "launcher", True),
    "torchrun is killed without a handler": ("two data", False, "load", 0, 1, (KILL,), "launcher", False),
    "a rank that others wait for": ("two stages", False, "training", 4, 1, (INT,), 1, False),
    "a rank that waits": ("two stages", False, "training", 4, 1, (TERM,), 0, False),
    "one of four ranks": ("two by two", True, "training", 2, 0, (HUP,), 3, True),
    "evaluation": ("two tensor", True, "evaluation", 3, 0, (USR1,), "groups", True),
    "last evaluation": ("one rank", True, "last evaluation", 5, 0, (INT,), 0, True),
    "a save is not done twice": ("one rank", True, "writing", 2, 0, (TERM,), "groups", True),
    "a save without a handler": ("one rank", False, "writing", 5, 0, (TERM,), "groups", False),
    "a second Ctrl-C in a save": ("two data", True, "gathering", 5, 1, (INT, INT), "groups", False),
    "import": ("one rank", True, "import", 0, 0, (INT,), "groups", False),
    "rendezvous": ("two data", True, "rendezvous", 0, 1, (TERM,), 0, False),
    "index": ("one rank", False, "index", 0, 0, (INT,), "groups", False),
}


@pytest.fixture(scope="module")
def bench(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(golden, tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("case", TRIALS)
def test_a_signal_ends_a_run(bench: Bench, tmp_path: Path, case: str):
    try_out(Trial(*TRIALS[case]), bench, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_a_seeded_signal_ends_a_run(bench: Bench, tmp_path: Path, seed: int):
    trial = seeded(seed)
    print(trial)
    print(f"ended after {try_out(trial, bench, tmp_path):.1f} s")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while left := [pid for pid in pids if _runs(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_data_workers_end_when_their_rank_is_killed(golden: Path, tmp_path: Path):
    words = tiny_gpt(golden, tmp_path, train_iters=100000, num_workers=2)
    run = start_pretrain_gpt(words, tmp_path)
    run.wait_for_text("iteration        3/")
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
    assert len(children) >= 2
    run.process.kill()
    run.process.join()
    _wait_until_gone([int(pid) for pid in children])


@pytest.mark.parametrize("target", ["script", "group"])
@pytest.mark.parametrize("number", [TERM, INT, USR1])
def test_the_launch_script_passes_signals_on(repo_root: Path, tmp_path: Path, number: int, target: str):
    code = (
        "import os, signal, sys, time; names = ('INT', 'TERM', 'USR1')\n"
        "for name in names: signal.signal(getattr(signal, 'SIG' + name), lambda n, _: sys.exit(40 + n))\n"
        "print(os.getpid(), flush=True); time.sleep(600)"
    )
    script = f'source {repo_root}/tests_gpt/launch.sh; pass_signals "$@"; echo not reached'
    started = subprocess.Popen(
        ["bash", "-c", script, "bash", sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    child = int(started.stdout.readline())
    (os.kill if target == "script" else os.killpg)(started.pid, number)
    output, _ = started.communicate(timeout=60)
    assert (started.returncode, output) == (40 + number, "")
    _wait_until_gone([child])


def test_training_ends_with_the_launch_script_that_waits_for_it(repo_root: Path, tmp_path: Path):
    code = (
        "import os, time; from megatron.training.processes import stop_signals\n"
        "stop_signals.install('in a test'); print(os.getpid(), flush=True); time.sleep(600)"
    )
    script = f'source {repo_root}/tests_gpt/launch.sh; pass_signals "$@"'
    started = subprocess.Popen(
        ["bash", "-c", script, "bash", sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(repo_root)},
    )
    child = int(started.stdout.readline())
    started.kill()
    _, errors = started.communicate(timeout=60)
    assert errors == "error: stopped by the end of its launcher in a test\n"
    _wait_until_gone([child])


def test_a_rank_started_by_hand_outlives_its_shell(repo_root: Path):
    code = (
        "import os, sys, time; from megatron.training.processes import stop_signals\n"
        "stop_signals.install(); print(os.getpid(), flush=True); sys.stdin.read(); print('done')"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "MEGATRON_LA"))}
    started = subprocess.Popen(
        ["bash", "-c", '"$@" <&3 & disown; exit', "bash", sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PYTHONPATH": str(repo_root), "RANK": "0", "WORLD_SIZE": "2"},
        preexec_fn=lambda: os.dup2(0, 3),  # noqa: PLW1509 -- this process has one thread here
        pass_fds=(3,),
    )
    pid = int(started.stdout.readline())
    started.wait(60)
    time.sleep(2)  # a look for the launcher takes place every second
    assert _runs(pid)
    assert started.communicate("", timeout=60)[0] == "done\n"
