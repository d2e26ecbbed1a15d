"""A run that gets a signal at a chosen moment, and what has to be true of its end."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from tests.functional_tests.launcher import (
    Started,
    pretrain_gpt,
    pretrain_gpt_ranks,
    start_pretrain_gpt,
    start_pretrain_gpt_ranks,
    tiny_gpt,
)
from tests.same_bits import assert_same_bits

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS, SAVE_INTERVAL, EVALUATION_AT = 6, 3, 4
# Limit on a busy machine; on an idle one every end takes less than 10 s.
LIMIT_S = 90

LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one rank": (1, {}),
    "two data": (2, {"use-distributed-optimizer": True}),
    "two tensor": (2, {"tensor-model-parallel-size": 2}),
    "two stages": (2, {"pipeline-model-parallel-size": 2}),
    "four data": (4, {"global-batch-size": 8}),
    "two by two": (4, {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2}),
}
BEFORE_TRAINING = ("import", "arguments", "rendezvous", "model", "load", "index")
IN_SAVE = ("gathering", "writing", "publishing", "tracker")
# Only rank 0 comes there. While names are given to files, a stop waits for the end of that.
OF_RANK_0 = ("index", "writing", "publishing", "tracker")
HELD_BACK = ("publishing", "tracker")


@dataclass(frozen=True)
class Trial:
    """One case.

    Attributes:
        layout: key of ``LAYOUTS``.
        saves: whether the run has ``--exit-signal-handler``.
        moment: see ``pauses.MOMENTS``; also ``import``.
        iteration: finished iterations by then, where the moment is in training.
        pausing_rank: rank that is there; the others go on until they wait for it.
        signals: sent one after the other.
        target: ``launcher``, ``groups`` (ranks with their workers) or the number of a rank.
        resumes: whether the pause ends when the signals are sent, else not before the process does.
    """

    layout: str
    saves: bool
    moment: str
    iteration: int
    pausing_rank: int
    signals: tuple[signal.Signals, ...]
    target: str | int
    resumes: bool

    @property
    def world_size(self) -> int:
        return LAYOUTS[self.layout][0]

    @property
    def is_recorded(self) -> bool:
        """Whether the run is to save and stop by itself."""
        at_once = len(self.signals) > 1 or signal.SIGQUIT in self.signals
        return self.saves and self.moment not in BEFORE_TRAINING and not at_once


def seeded(seed: int) -> Trial:
    """A trial drawn by chance, among those that make sense."""
    draw = random.Random(seed)
    layout = draw.choice([*LAYOUTS, "one rank"])
    ranks = range(LAYOUTS[layout][0])
    moment = draw.choice(
        [*BEFORE_TRAINING, "training", "training", "evaluation", *IN_SAVE, "last evaluation"]
    )
    if len(ranks) == 1:
        target = "groups" if moment == "import" else draw.choice(["groups", 0])
    elif moment == "import":
        target = "launcher"
    else:
        target = draw.choice(["launcher", "groups", "groups", draw.choice(ranks)])
    kinds = [signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    kinds += [signal.SIGKILL] if target == "launcher" else [signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT]
    signals = (draw.choice(kinds),)
    if signals == (signal.SIGINT,) and draw.random() < 0.3:
        signals *= 2
    iteration = {
        "training": draw.randrange(STEPS),
        "evaluation": EVALUATION_AT - 1,
        "last evaluation": STEPS - 1,
    }.get(moment, draw.choice([SAVE_INTERVAL - 1, STEPS - 1]))
    trial = Trial(
        layout,
        saves=draw.random() < 0.6,
        moment=moment,
        iteration=iteration,
        pausing_rank=0 if moment in OF_RANK_0 else draw.choice(ranks),
        signals=signals,
        target=target,
        resumes=False,
    )
    must_resume = trial.is_recorded or moment in (*HELD_BACK, "import")
    return replace(trial, resumes=must_resume or draw.random() < 0.3)


@dataclass
class Bench:
    """What trials share: the data, its index, and where uninterrupted runs have ended, by layout."""

    golden: Path
    directory: Path
    whole: dict[str, Path] = field(default_factory=dict)

    def words(self, trial: Trial, save: Path, cache: Path | None = None) -> list[str]:
        """The command line of a trial's run."""
        changes: dict[str, object] = {
            "train-iters": STEPS,
            "save": save,
            "load": save,
            "save-interval": SAVE_INTERVAL,
            "eval-interval": EVALUATION_AT,
            "eval-iters": 2,
            "num-workers": 1,
            "attention-dropout": 0.1,
            "hidden-dropout": 0.1,
            "data-cache-path": cache or self.directory / "cache",
            "exit-signal-handler": trial.saves,
            **LAYOUTS[trial.layout][1],
        }
        return tiny_gpt(self.golden, self.directory, **changes)

    def uninterrupted(self, trial: Trial) -> Path:
        """Save directory of a run of the same layout that nobody stopped."""
        if trial.layout not in self.whole:
            home = self.directory / trial.layout.replace(" ", "_")
            home.mkdir()
            self.run_to_the_end(trial, home / "ckpt", home)
            self.whole[trial.layout] = home / "ckpt"
        return self.whole[trial.layout]

    def run_to_the_end(self, trial: Trial, save: Path, home: Path) -> None:
        words = self.words(trial, save)
        runs = (
            [pretrain_gpt(words, home)]
            if trial.world_size == 1
            else pretrain_gpt_ranks(trial.world_size, words, home)
        )
        for run in runs:
            run.check()


class Job:
    """The processes of a trial."""

    def __init__(self, trial: Trial, bench: Bench, home: Path):
        self.trial, self.home = trial, home
        (home / "tmp").mkdir()
        (home / "pause").mkdir()
        cache = home / "cache" if trial.moment == "index" else None  # which is built then
        words = [str(word) for word in bench.words(trial, home / "ckpt", cache)]
        moment = "evaluation" if trial.moment == "last evaluation" else trial.moment
        environment = {
            "PAUSE_AT": moment,
            "PAUSE_RANK": str(trial.pausing_rank),
            "PAUSE_ITERATION": str(trial.iteration),
            "PAUSE_DIRECTORY": str(home / "pause"),
            "TMPDIR": str(home / "tmp"),
        }
        self._started: list[Started] = []
        self._launched: subprocess.Popen | None = None
        if trial.target == "launcher" or moment == "import":
            self._launch(words, environment)
        elif trial.world_size == 1:
            self._started = [start_pretrain_gpt(words, home, {**environment, "RANK": "0"})]
        else:
            self._started = start_pretrain_gpt_ranks(trial.world_size, words, home, env=environment)

    def _launch(self, words: list[str], environment: dict[str, str]) -> None:
        """With interpreters of their own, under torchrun where there are several ranks."""
        paths = [str(HERE / "paused_import"), str(ROOT), str(HERE)]
        environment = {**os.environ, **environment, "MEGATRON_DEVICE": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        command = [sys.executable]
        if self.trial.world_size > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            command += ["-m", "torch.distributed.run", "--nproc-per-node", str(self.trial.world_size)]
            # Torchrun's own words, among them a trace of what it received, stay apart.
            command += ["--master-port", str(port), "--redirects", "3", "--log-dir", str(self.home / "ranks")]
        else:
            environment.pop("PAUSE_RANK")
        script = ROOT / "pretrain_gpt.py" if self.trial.moment == "import" else HERE / "pauses.py"
        with open(self.home / "run0.log", "w") as log:
            self._launched = subprocess.Popen(
                [*command, str(script), *words],
                env=environment,
                cwd=self.home,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_paused(self) -> None:
        deadline = time.monotonic() + 4 * LIMIT_S
        while not (self.home / "pause" / "paused").exists():
            assert time.monotonic() < deadline and self._runs(), self.output()
            time.sleep(0.02)
        # Others may still be starting; until then they are in a session with the tests themselves.
        while len(self.pids()) < self.trial.world_size or any(self._session(p) != p for p in self.pids()):
            assert time.monotonic() < deadline and self._runs(), self.output()
            time.sleep(0.02)
        self._sessions = set(self.pids())

    def pids(self) -> list[int]:
        """Processes of the ranks."""
        if self._launched is None:
            return [run.process.pid for run in self._started]
        if self.trial.world_size == 1:
            return [self._launched.pid]
        return [pid for pid in _processes() if _status(pid)[1] == str(self._launched.pid)]

    def send(self) -> None:
        """The signals of the trial, and the end of its pause if that belongs to it."""
        for index, number in enumerate(self.trial.signals):
            time.sleep(0.4 * index)  # nobody presses Ctrl-C twice in less
            with contextlib.suppress(ProcessLookupError):  # the first one may have been enough
                self._send(number)
        if self.trial.resumes:
            (self.home / "pause" / "go").touch()

    def _send(self, number: int) -> None:
        if self.trial.target == "launcher":
            self._launched.send_signal(number)
        elif self.trial.target == "groups":
            for pid in self.pids():
                os.killpg(pid, number)
        else:
            os.kill(self.pids()[self.trial.target], number)

    def wait(self) -> list[int]:
        """Exit statuses, once no process of the ranks is left."""
        deadline = time.monotonic() + LIMIT_S
        while self._runs() or self.survivors():
            assert time.monotonic() < deadline, f"left: {self.survivors()}\n{self.output()}"
            time.sleep(0.02)
        if self._launched is not None:
            return [self._launched.wait()]
        return [run.wait().status for run in self._started]

    def survivors(self) -> list[int]:
        """Ranks and data workers that have not ended: all of a rank's are in one session."""
        return [
            pid for pid in _processes() if self._session(pid) in self._sessions and _status(pid)[0] != "Z"
        ]

    def kill(self) -> None:
        """Whatever has gone wrong, leave nothing behind."""
        if self._launched is not None:
            self._launched.kill()
            self._launched.wait()
        for run in self._started:
            run.process.kill()
        for pid in self.survivors() if hasattr(self, "_sessions") else []:
            os.kill(pid, signal.SIGKILL)

    def output(self) -> str:
        """What the ranks have printed."""
        logs = sorted(self.home.glob("*.log"))
        if self._launched is not None and self.trial.world_size > 1:
            logs = sorted((self.home / "ranks").rglob("std*.log"))
        return "".join(log.read_text() for log in logs)

    def _runs(self) -> bool:
        if self._launched is not None:
            return self._launched.poll() is None
        return any(run.process.is_alive() for run in self._started)

    @staticmethod
    def _session(pid: int) -> int:
        try:
            return os.getsid(pid)
        except ProcessLookupError:
            return -1


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _status(pid: int) -> list[str]:
    """State, parent and so on, from ``/proc``; a zombie for what is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z", "0"]


def try_out(trial: Trial, bench: Bench, home: Path) -> float:
    """Run a trial and hold its end to what was promised; returns the seconds that it took to end."""
    whole = bench.uninterrupted(trial)
    shared_memory = set(os.listdir("/dev/shm"))
    job = Job(trial, bench, home)
    try:
        job.wait_until_paused()
        started = time.monotonic()
        job.send()
        statuses = job.wait()
        seconds = time.monotonic() - started
    finally:
        job.kill()
    output = job.output()
    assert "Traceback" not in output and "Exception" not in output, output
    said = _check_words(trial, output, statuses)
    _check_files(home)
    assert not _left_in_shared_memory(shared_memory)
    stands = _tracker(home / "ckpt")
    _check_iteration(trial, said, stands, output)
    if stands is not None:
        bench.run_to_the_end(trial, home / "ckpt", home)
        _compare(home / "ckpt", whole)
    return seconds


def _left_in_shared_memory(before: set[str]) -> list[str]:
    """Tensors that a process which has ended left to nobody; tests beside this one have theirs there too."""
    named = [(name, re.match(r"torch_(\d+)_", name)) for name in set(os.listdir("/dev/shm")) - before]
    return [name for name, owner in named if owner and not Path(f"/proc/{owner.group(1)}").exists()]


def _check_words(trial: Trial, output: str, statuses: list[int]) -> str:
    """One line and the right statuses; returns the line."""
    lines = [line for line in output.splitlines() if "error: " in line or "exiting program after" in line]
    assert len(lines) == 1, output
    name = trial.signals[0].name
    status = 128 + trial.signals[0]
    if trial.signals == (signal.SIGKILL,):  # of torchrun
        name, status = "the end of its launcher", 128 + signal.SIGHUP
    if trial.is_recorded:
        received = name if trial.signals == (signal.SIGKILL,) else f"receiving {name}"
        assert lines[0].startswith(f"[exiting program after {received}.]"), output
        status = 0
    elif len(trial.signals) > 1:
        assert "error: stopped" in lines[0] and "SIGINT" in lines[0], output
    elif signal.SIGQUIT in trial.signals:
        assert "error: stopped at once by SIGQUIT" in lines[0], output
    else:
        assert f"error: stopped by {name} " in lines[0], output
    if trial.moment in BEFORE_TRAINING and len(trial.signals) == 1:
        assert "before training began: nothing to save" in lines[0], output
    if trial.target != "launcher":  # whose own status is torch's affair
        assert statuses == [status] * len(statuses), (statuses, output)
    return lines[0]


def _check_files(home: Path) -> None:
    assert os.listdir(home / "tmp") == []
    # What was being written is hidden, and goes with the next save; nothing else may be there.
    left = (
        [entry for entry in os.listdir(home / "ckpt") if "iter" not in entry]
        if (home / "ckpt").exists()
        else []
    )
    assert set(left) <= {"latest_checkpointed_iteration.txt"}
    if (home / "cache").exists():
        assert not [path for path in (home / "cache").iterdir() if path.suffix == ".partial"]


def _tracker(save: Path) -> int | None:
    path = save / "latest_checkpointed_iteration.txt"
    return int(path.read_text()) if path.exists() else None


def _check_iteration(trial: Trial, said: str, stands: int | None, output: str) -> None:
    saved = re.findall(r"saving checkpoint at iteration +(\d+)", output)
    assert len(saved) == len(set(saved)), output
    if trial.is_recorded:
        # A rank that computes may hear of it when the others have asked already; that a launcher is gone is
        # found by a thread, which a busy machine may let wait for several of these short steps.
        last = STEPS if signal.SIGKILL in trial.signals else trial.iteration + 2
        assert trial.iteration < stands <= min(last, STEPS), (said, stands)
        return
    claimed = re.search(r"(?:checkpoint of|after) iteration (\d+)", said)
    complete = int(claimed.group(1)) if claimed else None
    if complete != stands:  # the ranks end a moment after the line
        assert trial.moment in IN_SAVE and trial.pausing_rank != trial.target, (said, stands)


def _compare(save: Path, whole: Path) -> None:
    """Weights, optimizer and random states of all ranks at the end, bit by bit."""
    load = partial(torch.load, weights_only=False, map_location="cpu")
    names = sorted(path.relative_to(whole) for path in (whole / f"iter_{STEPS:07d}").rglob("*.pt"))
    assert names
    for name in names:
        mine, other = load(save / name), load(whole / name)
        for state in (mine, other):
            args = state.pop("args", None)
            if args is not None:
                state["consumed"] = [args.consumed_train_samples, args.consumed_valid_samples]
        assert_same_bits(mine, other, str(name))
