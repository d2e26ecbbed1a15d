"""Ranks are killed at any moment under ``torchrun --max-restarts``, and training ends with the same bits."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from same_bits import assert_same_bits
from small_ranks import free_port

from launcher import pretrain_gpt_ranks, tiny_gpt

RANKS = 2
LIMIT_S = 120
TRAINING = {"lr-warmup-iters": 0, "save-interval": 5}
# A kill comes at the latest after so many iterations, so that all come before the last one.
BETWEEN_KILLS = 10
_ITERATION = re.compile(r"iteration +(\d+)/")


class Torchrun:
    """Agents of one job on this machine, and the processes that they start."""

    def __init__(self, agents: list[list[str]], words: list[str], tmp_path: Path, repo_root: Path):
        environment = {
            **os.environ,
            "PYTHONPATH": str(repo_root),
            "MEGATRON_DEVICE": "cpu",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self.log = tmp_path / "torchrun.log"
        command = [sys.executable, "-m", "torch.distributed.run"]
        script = [str(repo_root / "pretrain_gpt.py"), *words]
        with open(self.log, "a") as log:
            self.agents = [
                subprocess.Popen(
                    [*command, *flags, *script], cwd=tmp_path, env=environment, stdout=log, stderr=log
                )
                for flags in agents
            ]

    def ranks(self) -> dict[int, tuple[int, int]]:
        """Process and number of restarts by rank."""
        found = {}
        for agent in self.agents:
            for pid in _children(agent.pid):
                variables = _environment(pid)
                if variables.get("RANK", "").isdigit():
                    found[int(variables["RANK"])] = (pid, int(variables["TORCHELASTIC_RESTART_COUNT"]))
        return found

    def wait_for_ranks(self, other_than: set[int]) -> dict[int, tuple[int, int]]:
        """All ranks, once none is one of some processes."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            ranks = self.ranks()
            if len(ranks) == RANKS and not other_than & {pid for pid, _ in ranks.values()}:
                return ranks
            assert time.monotonic() < deadline and self.runs(), self.log.read_text()[-6000:]
            time.sleep(0.05)

    def progress(self) -> int:
        """Last iteration in the log."""
        return int((_ITERATION.findall(self.log.read_text()) or ["0"])[-1])

    def runs(self) -> bool:
        return all(agent.poll() is None for agent in self.agents)

    def wait(self) -> None:
        for agent in self.agents:
            assert agent.wait(LIMIT_S) == 0, self.log.read_text()[-6000:]

    def kill(self) -> None:
        for agent in self.agents:
            for pid in _children(agent.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            agent.kill()
            agent.wait()


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _environment(pid: int) -> dict[str, str]:
    with contextlib.suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return {}


def words_of(golden: Path, tmp_path: Path, name: str, kills: int) -> list[str]:
    changes = {"save": tmp_path / name, "load": tmp_path / name, "train-iters": iterations(kills)}
    return [str(word) for word in tiny_gpt(golden, tmp_path, **TRAINING, **changes)]


def iterations(kills: int) -> int:
    return 2 * BETWEEN_KILLS * (kills + 2)


def final(tmp_path: Path, name: str, kills: int) -> dict:
    path = tmp_path / name / f"iter_{iterations(kills):07d}" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(path, weights_only=False)
    return {part: state[part] for part in ("model", "optimizer", "opt_param_scheduler", "iteration")}


def train_while_ranks_are_killed(job: Torchrun, kills: int, seed: int) -> int:
    """Kill a rank ``kills`` times, at moments from the start of its process to well in its training.

    Returns:
        Number of restarts that torchrun counts in the end, over all agents.
    """
    choose = random.Random(seed)
    killed: set[int] = set()
    for _ in range(kills):
        ranks = job.wait_for_ranks(killed)
        latest = job.progress() + choose.randint(1, BETWEEN_KILLS)
        # Half of the kills hit imports, the meeting and the set-up, the others the training.
        moment = time.monotonic() + (choose.uniform(0.0, 5.0) if choose.random() < 0.5 else LIMIT_S)
        while job.runs() and time.monotonic() < moment and job.progress() < latest:
            time.sleep(0.01)
        assert job.runs(), job.log.read_text()[-6000:]
        killed |= {pid for pid, _ in ranks.values()}
        os.kill(ranks[choose.randrange(RANKS)][0], signal.SIGKILL)
    ranks = job.wait_for_ranks(killed)
    job.wait()
    return sum({restarts for _, restarts in ranks.values()})


def uninterrupted(golden: Path, tmp_path: Path, kills: int) -> dict:
    for run in pretrain_gpt_ranks(RANKS, words_of(golden, tmp_path, "whole", kills), tmp_path):
        run.check()
    return final(tmp_path, "whole", kills)


@pytest.mark.slow
def test_agents_of_two_hosts_count_restarts_differently(golden: Path, tmp_path: Path, repo_root: Path):
    """The agent of the killed rank counts one more than the other: nothing may follow from the number."""
    kills = 2
    where = f"--rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{free_port()} --rdzv-id=x --local-addr=127.0.0.1"
    flags = f"--nnodes=2 --nproc-per-node=1 --max-restarts=10 {where}"
    agents = [flags.split() for _ in range(2)]
    job = Torchrun(agents, words_of(golden, tmp_path, "killed", kills), tmp_path, repo_root)
    try:
        train_while_ranks_are_killed(job, kills, seed=1)
    finally:
        job.kill()
    assert_same_bits(final(tmp_path, "killed", kills), uninterrupted(golden, tmp_path, kills))


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_every_restart_is_used_and_the_bits_are_equal(
    kills: int, golden: Path, tmp_path: Path, repo_root: Path
):
    flags = ["--standalone", f"--nproc-per-node={RANKS}", "--max-restarts=40"]
    job = Torchrun([flags], words_of(golden, tmp_path, "killed", kills), tmp_path, repo_root)
    try:
        assert train_while_ranks_are_killed(job, kills, seed=kills) == kills
    finally:
        job.kill()
    assert_same_bits(final(tmp_path, "killed", kills), uninterrupted(golden, tmp_path, kills))
