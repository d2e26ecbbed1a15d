"""Worker processes that hand back results in order, and whose death is noticed at once.

The coordinator and each worker share a pipe of their own, and every process closes the ends that are not its:
the moment a worker dies its pipe reads end-of-file, so nobody ever waits for a result that cannot come.
``multiprocessing.Pool`` replaces a killed worker and waits for the lost task for ever.

A worker holds one block at a time, and the blocks that are neither given out nor written are bounded, so
memory does not grow with the input.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from megatron.core.errors import MegatronError

# Results that may wait for a slow earlier one, in blocks for each worker.
WINDOW_PER_WORKER = 4


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
        try:
            for number in range(workers):
                inherited = [worker.connection for worker in self._workers]
                self._workers.append(_Worker(context, number, build, inherited))
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

        An error in making the tasks is raised when all results before it have been taken, so that which error
        is met first does not depend on the speed of the workers.

        Raises:
            WorkerError: a worker died.
        """
        window = WINDOW_PER_WORKER * len(self._workers)
        idle = list(self._workers)
        given: dict[_Worker, int] = {}
        waiting: dict[int, list[Any]] = {}  # number of the task -> the task, and its result once there is one
        supply = _Supply(tasks)
        first = 0  # number of the first task whose result has not been yielded
        while supply.task is not None or waiting:
            while idle and supply.task is not None and supply.number < first + window:
                worker = idle.pop()
                given[worker] = supply.number
                waiting[supply.number] = [supply.task]
                worker.give(supply.task)
                supply.advance()
            for worker in self._ready(given):
                waiting[given.pop(worker)].append(worker.result())
                idle.append(worker)
            while len(waiting.get(first, ())) == 2:
                yield tuple(waiting.pop(first))
                first += 1
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

    def _ready(self, given: dict["_Worker", int]) -> list["_Worker"]:
        """Wait until some worker has a result; an idle one that died is noticed too."""
        by_handle: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers}
        ready = [by_handle[handle] for handle in wait(list(by_handle))]
        for worker in ready:
            if worker not in given:
                worker.result()  # raises: an idle worker has nothing to say but its death
        return ready


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
        inherited: list[Connection],
    ):
        self.number = number
        self.connection, theirs = context.Pipe()
        # A fork has these open too; as long as it does, their owners' death would not show.
        not_theirs = [*inherited, self.connection] if context.get_start_method() == "fork" else []
        self.process = context.Process(
            target=_serve, args=(theirs, not_theirs, build, number), daemon=True, name=f"preprocess-{number}"
        )
        self.process.start()
        theirs.close()

    def give(self, task: Any) -> None:
        try:
            send(self.connection, task)
        except (BrokenPipeError, ConnectionResetError):
            raise WorkerError(self.obituary()) from None

    def result(self) -> Any:
        try:
            return receive(self.connection)
        except (EOFError, ConnectionResetError):
            raise WorkerError(self.obituary()) from None

    def end(self, at_once: bool) -> None:
        if at_once:
            self.process.kill()
            return
        with suppress(BrokenPipeError, ConnectionResetError):
            send(self.connection, None)

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
        elif -code == signal.SIGTERM:
            cause = "somebody or a batch system asked it to stop"
        return f"{who} was killed by signal {-code} ({name}): {cause}"


def _serve(ours: Connection, not_ours: list[Connection], build: Callable[[], Work], number: int) -> None:
    """The life of a worker process: build, then one task after the other until told to stop."""
    for connection in not_ours:
        connection.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the coordinator decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        # What building has to say (a fallback, a warning) is said once, by the first worker.
        with _muted(number > 0):
            work = _attempt(build)
        failed = isinstance(work, Failure)
        send(ours, work if failed else work.facts)
        while not failed and (task := receive(ours)) is not None:
            send(ours, _attempt(work, task))
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


def send(connection: Connection, message: Any) -> None:
    """Pickle a message; arrays go behind it as they lie in memory, without a copy."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    connection.send_bytes(pickle.dumps((len(buffers), head)))
    for buffer in buffers:
        connection.send_bytes(buffer.raw())


def receive(connection: Connection) -> Any:
    """Inverse of :func:`send`."""
    count, head = pickle.loads(connection.recv_bytes())
    return pickle.loads(head, buffers=[connection.recv_bytes() for _ in range(count)])
