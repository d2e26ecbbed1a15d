"""A pool of ranks: a distributed test is a function that every rank of a small gloo world runs.

    def doubled_sum(value):
        tensor = torch.tensor(value * (dist.get_rank() + 1))
        dist.all_reduce(tensor)
        return int(tensor)

    assert run_ranks(4, doubled_sum, 1) == [10, 10, 10, 10]

The workers live as long as the test process, so no test pays for imports. A job gets a fresh default process
group of exactly its world size, and leaves nothing behind (``worker_state.reset``).
"""

import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from tests.distributed import fork_server
from tests.distributed.worker import LEFT, Answer, Place, serve, stack_file

MAX_WORLD_SIZE = 8
# Time that ranks get to report why they failed once one of them has: the others wait in a collective until
# the failed rank's connections close.
GRACE_S = 20.0
# Time for a stuck rank to write down its stack, and how often to look.
STACK_S, LOOK_S = 10.0, 0.1
# Time for a rank that has answered to leave its world.
LEAVE_S = 60.0


class _Worker:
    """One process, and the pipe over which it takes jobs and gives results."""

    def __init__(self) -> None:
        context = fork_server.context()
        self.pipe, theirs = context.Pipe()
        # Daemonic: it ends with the test process, also where that fails.
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


_workers: list[_Worker] = []


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 240, **kwargs: Any
) -> list[Any]:
    """Run ``function(*args, **kwargs)`` on every rank of a fresh gloo world.

    ``torch.distributed`` is initialized when it starts; ``parallel_state`` is not. RANK, WORLD_SIZE,
    LOCAL_RANK and LOCAL_WORLD_SIZE are set.

    Args:
        world_size: number of ranks, 1 to 8.
        function: defined at the top level of a module; arguments and results must be picklable.
        timeout: seconds for the whole job, also the timeout of its collectives. It is there for jobs that
            hang; a job that takes a second has a minute on a loaded machine.

    Returns:
        The results, by rank.

    Raises:
        AssertionError: a rank raised, died or did not end in time; the message holds every rank's traceback.
    """
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size {world_size}: the pool has 1 to {MAX_WORLD_SIZE} ranks")
    while len(_workers) < world_size:
        _workers.append(_Worker())
    with tempfile.TemporaryDirectory(prefix="ranks") as directory:
        call = pickle.dumps((function, args, kwargs))
        try:
            for rank, worker in enumerate(_workers[:world_size]):
                worker.pipe.send(Place(rank, world_size, directory, timeout, list(sys.path)))
                worker.pipe.send_bytes(call)
            answers, stuck = _collect(world_size, timeout, directory)
            _dismiss(answers)
        except BaseException:  # Ctrl-C: the ranks are somewhere in the job, and write into its directory
            close()
            raise
    failed = {rank: answer for rank, answer in answers.items() if answer.result is None}
    if failed or stuck:
        raise AssertionError(_report(function, world_size, timeout, failed, stuck))
    return [pickle.loads(answers[rank].result) for rank in range(world_size)]


def _collect(world_size: int, timeout: float, directory: str) -> tuple[dict[int, Answer], dict[int, str]]:
    """Answers by rank, and the stacks of the ranks that gave none in time; those are killed and replaced."""
    pending = {_workers[rank].pipe: rank for rank in range(world_size)}
    answers: dict[int, Answer] = {}
    deadline = time.monotonic() + timeout
    while pending and (
        ready := connection.wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
    ):
        for pipe in ready:
            rank = pending.pop(pipe)
            try:
                answers[rank] = pipe.recv()
            except (EOFError, OSError):
                answers[rank] = _bury(rank)
            if answers[rank].result is None:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return answers, _kill_stuck(sorted(pending.values()), directory)


def _dismiss(answers: dict[int, Answer]) -> None:
    """Let the ranks leave their world, and wait until they have: until then they write into its directory."""
    alive = [rank for rank, answer in answers.items() if not answer.died]
    for rank in alive:
        if answers[rank].result is not None:
            _workers[rank].pipe.send("leave")
    deadline = time.monotonic() + LEAVE_S
    for rank in alive:
        pipe = _workers[rank].pipe
        try:
            left = pipe.poll(max(0.0, deadline - time.monotonic())) and pipe.recv() == LEFT
        except (EOFError, OSError):
            left = False
        if not left:
            _replace(rank)


def _replace(rank: int) -> int | None:
    """Put a new worker in the place of one that is killed here, or has died; the exit status of the old."""
    worker = _workers[rank]
    worker.kill()
    _workers[rank] = _Worker()
    return worker.process.exitcode


def _bury(rank: int) -> Answer:
    """Replace a worker that died by itself."""
    text = f"the process died with exit code {_replace(rank)}\n"
    return Answer(None, text, time.monotonic(), died=True)


def _kill_stuck(ranks: list[int], directory: str) -> dict[int, str]:
    """Ask stuck workers where they are, kill them, and start new ones in their places."""
    for rank in ranks:
        os.kill(_workers[rank].process.pid, signal.SIGUSR1)
    stacks = {rank: _stack(Path(stack_file(directory, rank))) for rank in ranks}
    for rank in ranks:
        _replace(rank)
    return stacks


def _stack(file: Path) -> str:
    """The stack that a rank was asked for, once it is written."""
    text, deadline = "", time.monotonic() + STACK_S
    while file.exists() and time.monotonic() < deadline:
        time.sleep(LOOK_S)
        before, text = text, file.read_text()
        if text and text == before:
            break
    return text or "not started\n"


def close() -> None:
    """End all workers; the next job starts new ones."""
    while _workers:
        _workers.pop().kill()


def _report(
    function: Callable, world_size: int, timeout: float, failed: dict[int, Answer], stuck: dict[int, str]
) -> str:
    lines = [f"{function.__module__}.{function.__qualname__} failed on {world_size} ranks"]
    # In the order of failing: the first one is the cause, the others lost their connections to it.
    for rank, answer in sorted(failed.items(), key=lambda item: item[1].ended_s):
        lines.append(f"---- rank {rank}\n{answer.traceback}")
    waited = f"{GRACE_S:g} s after the first failure" if failed else f"{timeout:g} s"
    for rank, stack in stuck.items():
        lines.append(f"---- rank {rank}: no end within {waited}, killed\n{stack}")
    return "\n".join(lines)
