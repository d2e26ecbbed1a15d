"""Worker processes that hand back results in order, and whose death is noticed at once.

The coordinator and each worker share a pipe of their own, and every process closes the ends that are not its:
the moment a worker dies its pipe reads end-of-file, so nobody ever waits for a result that cannot come.
``multiprocessing.Pool`` replaces a killed worker and waits for the lost task for ever.

A worker holds one block at a time, and the blocks that are neither given out nor written are bounded, so
memory does not grow with the input.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from megatron.core.errors import MegatronError
from megatron.training.child_processes import ignore_signals, starting_workers
from megatron.training.preprocessing.channel import SharedSlots, receive, send

# Address space for one task or one result; a larger one takes the slower way through the pipe.
_SLOT_BYTES = 16 << 20


class Work(Protocol):
    """What a worker does; built inside the worker."""

    facts: Any

    def __call__(self, task: Any) -> Any: ...


class WorkerError(MegatronError):
    """A worker process died, or its code failed."""


@dataclass(frozen=True)
class Failure:
    """An exception on its way from the work to whoever takes the results."""

    error: MegatronError

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        if isinstance(error, MegatronError):
            # Some of its classes cannot be pickled and made again; their message is what counts.
            portable = isinstance(error, PortableError)
            return cls(error if portable else MegatronError(str(error)))
        if isinstance(error, MemoryError):
            return cls(WorkerError("no memory left; try fewer --workers, or free some memory"))
        return cls(WorkerError(f"unexpected failure, please report it:\n{traceback.format_exc()}"))


class PortableError(MegatronError):
    """Base of errors that pass from process to process as they are: picklable, all fields in ``args``."""


Outcomes = Iterator[tuple[Any, Any]]


def map_here(work: Callable[[Any], Any], tasks: Iterator[Any]) -> Outcomes:
    """What :meth:`WorkerPool.map_in_order` does, in this process."""
    for task in tasks:
        yield task, _attempt(work, task)


class WorkerPool:
    """``workers`` processes, each with its own ``build()``.

    Args:
        build: makes the work; called once in each process. Picklable.
        workers: number of processes, at least 1.

    Attributes:
        facts: ``facts`` of the work, as the first worker built it.

    Raises:
        MegatronError: raised by ``build``, or a worker died in it.
    """

    def __init__(self, build: Callable[[], Work], workers: int):
        # A fork shares what is already imported. No thread has been started yet that it could lose.
        method = "fork" if sys.platform == "linux" else "spawn"
        context = multiprocessing.get_context(method)
        self._workers: list[_Worker] = []
        # One task in each worker, and as many results again that wait for a slow earlier one.
        self._window = 2 * workers + 2
        slots = SharedSlots(self._window if method == "fork" else 0, _SLOT_BYTES)
        try:
            for number in range(workers):
                inherited = [worker.connection for worker in self._workers]
                self._workers.append(_Worker(context, number, build, slots, inherited))
            started = [worker.result() for worker in self._workers]
            for failure in (result for result in started if isinstance(result, Failure)):
                raise failure.error
            self.facts = started[0]
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(at_once=kind is not None)

    def map_in_order(self, tasks: Iterator[Any]) -> Outcomes:
        """Yield (task, result or :class:`Failure`) in the order of the tasks.

        A result is good until the next one is asked for. An error in making the tasks is raised when all
        results before it have been taken, so the speed of the workers does not decide which error is met.

        Raises:
            WorkerError: a worker died.
        """
        idle = list(self._workers)
        busy: set[_Worker] = set()
        waiting: dict[int, list[Any]] = {}  # number of the task -> the task, and its result once there is one
        supply = _Supply(tasks)
        first = 0  # number of the first task whose result has not been taken
        while supply.task is not None or waiting:
            while idle and supply.task is not None and supply.number < first + self._window:
                worker = idle.pop()
                busy.add(worker)
                waiting[supply.number] = [supply.task]
                worker.give(supply.number, supply.task)
                supply.advance()
            while len(waiting.get(first, ())) == 2:
                yield tuple(waiting.pop(first))
                first += 1
            for worker in self._ready() if busy else ():
                result = worker.result()  # raises if it is dead, be it busy or idle
                waiting[worker.number_given].append(result)
                busy.remove(worker)
                idle.append(worker)
        if supply.error is not None:
            raise supply.error

    def stop(self, at_once: bool = True) -> None:
        """End the processes: when they are done, or at once."""
        for worker in self._workers:
            worker.end(at_once)
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers = []

    def _ready(self) -> list["_Worker"]:
        """Wait for results, or for a death: an idle worker has nothing else to tell."""
        by_handle: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers}
        return [by_handle[handle] for handle in wait(list(by_handle))]


class _Supply:
    """The next task, made ahead of the worker that will ask for it."""

    def __init__(self, tasks: Iterator[Any]):
        self._tasks = tasks
        self.number = -1
        self.task: Any = None
        self.error: MegatronError | None = None
        self.advance()

    def advance(self) -> None:
        self.number += 1
        try:
            self.task = next(self._tasks, None)
        except MegatronError as error:
            self.task, self.error = None, error


class _Worker:
    """One process, seen from the coordinator."""

    def __init__(
        self,
        context: multiprocessing.context.BaseContext,
        number: int,
        build: Callable[[], Work],
        slots: SharedSlots,
        inherited: list[Connection],
    ):
        self.number = number
        self.number_given = 0  # of the task at hand
        self._slots = slots
        self.connection, theirs = context.Pipe()
        # A fork has these open too; as long as it does, their owners' death would not show.
        not_theirs = [*inherited, self.connection] if context.get_start_method() == "fork" else []
        self.process = context.Process(
            target=_serve,
            args=(theirs, not_theirs, build, slots, number),
            daemon=True,
            name=f"preprocess-{number}",
        )
        with starting_workers():
            self.process.start()
        theirs.close()

    def give(self, number: int, task: Any) -> None:
        self.number_given = number
        try:
            self.connection.send(number)
            send(self.connection, task, self._slots[number])
        except (BrokenPipeError, ConnectionResetError):
            raise WorkerError(self.obituary()) from None

    def result(self) -> Any:
        try:
            return receive(self.connection, self._slots[self.number_given])
        except (EOFError, ConnectionResetError):
            raise WorkerError(self.obituary()) from None

    def end(self, at_once: bool) -> None:
        if at_once:
            self.process.kill()
            return
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(None)

    def obituary(self) -> str:
        self.process.join(timeout=10)
        who = f"worker {self.number} (process {self.process.pid})"
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"{who} ended by itself with exit status {code}"
        name = signal.Signals(-code).name
        cause = "it crashed in native code"
        if -code == signal.SIGKILL:
            cause = "most likely the system ran out of memory (see dmesg); try fewer --workers"
        return f"{who} was killed by signal {-code} ({name}): {cause}"


def _serve(
    ours: Connection, not_ours: list[Connection], build: Callable[[], Work], slots: SharedSlots, place: int
) -> None:
    """The life of a worker process: build, then one task after the other until told to stop."""
    for connection in not_ours:
        connection.close()
    ignore_signals()
    try:
        # What building has to say (a fallback, a warning) is said once, by the first worker.
        with _muted(place > 0):
            work = _attempt(build)
        failed = isinstance(work, Failure)
        send(ours, work if failed else work.facts, slots[0])
        while not failed and (number := ours.recv()) is not None:
            result = _attempt(work, receive(ours, slots[number]))
            send(ours, result, slots[number])
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the coordinator is gone


def _attempt(action: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return action(*arguments)
    except Exception as error:
        return Failure.of(error)


@contextmanager
def _muted(mute: bool) -> Iterator[None]:
    if not mute:
        yield
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(nowhere)
