"""Runs entry points as a user does, without paying for their imports each time.

A fork server imports torch and the entry point once; every run is a fresh process forked from it, with
its own arguments, working directory, environment and output file.
"""

import contextlib
import multiprocessing
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.distributed import fork_server
from tests.functional_tests import pauses
from tests.reserved_port import ReservedPort

# For what hangs; a loaded machine needs several times what an idle one does.
TIMEOUT_S = 900

_LOSS = re.compile(r"iteration +(\d+)/.*?lm loss: ([0-9.E+-]+)")
_EVAL = re.compile(r"(?:validation|test) loss at (.*?) \| lm loss value: ([0-9.E+-]+)")


@dataclass(frozen=True)
class Run:
    """What one process left behind."""

    status: int
    output: str

    @property
    def losses(self) -> dict[int, float]:
        """Loss by iteration, from the log lines."""
        return {int(i): float(loss) for i, loss in _LOSS.findall(self.output)}

    @property
    def evaluations(self) -> dict[str, float]:
        """Loss by the label of its evaluation."""
        return {label: float(loss) for label, loss in _EVAL.findall(self.output)}

    def check(self) -> "Run":
        """Fail the test with the output unless the run ended well."""
        assert self.status == 0, self.output
        return self


def _child(argv: list[str], cwd: str, env: dict[str, str], output: str, trace: str | None) -> None:
    os.chdir(cwd)
    os.environ.update(env)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = ["pretrain_gpt.py", *argv]
    # As in a process that a user starts; this one would have its own workers made by the fork server.
    multiprocessing.set_start_method(None, force=True)

    import torch

    import pretrain_gpt
    from megatron.training.entry import run_main
    from megatron.training.processes import stop_signals

    torch.set_num_threads(1)
    if "PAUSE_AT" in os.environ:
        stop_signals.install(stop_signals.BEFORE_TRAINING)  # as the script does
        os.setsid()  # so that signals reach this rank and its workers, as under torchrun
        pauses.pause_where_asked()
    if trace is not None:
        _trace_steps(pretrain_gpt, trace)
    with contextlib.suppress(ValueError):
        sys.stdout.reconfigure(line_buffering=True)
    run_main(pretrain_gpt.main)


def _trace_steps(entry, path: str) -> None:
    """Record the exact bits of every batch and loss."""
    original_batch, original_loss = entry.get_batch, entry.loss_func

    def get_batch(iterator):
        batch = original_batch(iterator)
        with open(path, "a") as file:
            file.write(f"tokens {batch[0].flatten().tolist()}\n")
        return batch

    def loss_func(loss_mask, output):
        result = original_loss(loss_mask, output)
        with open(path, "a") as file:
            file.write(f"loss {float(result[0]).hex()} {int(result[1])}\n")
        return result

    entry.get_batch, entry.loss_func = get_batch, loss_func


class Started:
    """A run that is going on."""

    def __init__(self, process, output: Path):
        self.process, self._output = process, output
        self.port: ReservedPort | None = None  # where its ranks meet

    def wait(self) -> Run:
        """Wait for the end; a run that hangs is killed and fails the test."""
        self.process.join(TIMEOUT_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            raise AssertionError(f"no end within {TIMEOUT_S} s\n{self._output.read_text()}")
        return Run(self.process.exitcode, self._output.read_text())

    def wait_for_text(self, text: str) -> None:
        """Wait until the run has printed ``text``."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (self._output.exists() and text in self._output.read_text()):
            assert self.process.is_alive() and time.monotonic() < deadline, self._output.read_text()
            time.sleep(0.02)


def _start(words: list[str], cwd: Path, env: dict[str, str], output: Path, trace: Path | None) -> Started:
    process = fork_server.context().Process(
        target=_child, args=([str(w) for w in words], str(cwd), env, str(output), trace and str(trace))
    )
    process.start()
    return Started(process, output)


def start_pretrain_gpt(
    argv: list[str], tmp_path: Path, env: dict[str, str] | None = None, trace: Path | None = None
) -> Started:
    """Start ``pretrain_gpt.py argv`` in ``tmp_path``.

    Args:
        argv: command-line words.
        tmp_path: working directory, also home of the output file.
        env: additional environment variables.
        trace: file that receives the bits of every batch and loss.
    """
    number = sum(1 for _ in tmp_path.glob("run*.log"))
    environment = {"MEGATRON_DEVICE": "cpu", **(env or {})}
    return _start(argv, tmp_path, environment, tmp_path / f"run{number}.log", trace)


def start_pretrain_gpt_ranks(
    world_size: int, argv: list[str], tmp_path: Path, env: dict[str, str] | None = None
) -> list[Started]:
    """Start ``pretrain_gpt.py argv`` on ``world_size`` ranks, with the environment ``torchrun`` would give.

    They meet over TCP at a port of this machine, as a user's ranks do. For many short runs the pool of
    ``tests.distributed`` is faster; this is for what only a process of its own shows: exit status, signals,
    errors printed once.

    Returns:
        The runs, by rank.
    """
    number = sum(1 for _ in tmp_path.glob("ranks*_of_0.log"))
    port = ReservedPort()
    started = []
    for rank in range(world_size):
        environment = {
            "MEGATRON_DEVICE": "cpu",
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(world_size),
            **(env or {}),
        }
        started.append(_start(argv, tmp_path, environment, tmp_path / f"ranks{number}_of_{rank}.log", None))
        started[-1].port = port
    return started


def pretrain_gpt_ranks(world_size: int, argv: list[str], tmp_path: Path, **options) -> list[Run]:
    """Run ``pretrain_gpt.py argv`` on ranks to the end; options of ``start_pretrain_gpt_ranks``."""
    started = start_pretrain_gpt_ranks(world_size, argv, tmp_path, **options)
    try:
        return [run.wait() for run in started]
    finally:
        for run in started:
            run.process.kill()


def pretrain_gpt(argv: list[str], tmp_path: Path, **options) -> Run:
    """Run ``pretrain_gpt.py argv`` to its end; options of ``start_pretrain_gpt``."""
    return start_pretrain_gpt(argv, tmp_path, **options).wait()


def tiny_gpt(golden: Path, tmp_path: Path, **changes: object) -> list[str]:
    """Arguments of a GPT that trains in a second; ``changes`` replace or add flags (None drops one)."""
    flags: dict[str, object] = {
        "num-layers": 2,
        "hidden-size": 32,
        "num-attention-heads": 4,
        "seq-length": 32,
        "max-position-embeddings": 32,
        "micro-batch-size": 2,
        "global-batch-size": 4,
        "train-iters": 8,
        "lr": 1e-3,
        "lr-warmup-iters": 2,
        "tokenizer-type": "NullTokenizer",
        "vocab-size": 500,
        "data-path": golden / "data" / "u16_text_document",
        "data-cache-path": tmp_path / "cache",
        "split": "90,8,2",
        "log-interval": 1,
        "eval-iters": 0,
        "eval-interval": 1000,
        "num-workers": 0,
        "transformer-impl": "local",
        "ckpt-format": "torch",
    }
    flags.update({name if "-" in name else name.replace("_", "-"): value for name, value in changes.items()})
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, list | tuple):
            words += map(str, value)
        elif value is not True:
            words.append(str(value))
    return words
