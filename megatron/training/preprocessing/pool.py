"""Worker processes that return results in order, and whose death is detected at once.

The coordinator and each worker share a pipe of their own, and every process closes the ends that belong to
others: when a worker dies its pipe reads end-of-file, so nothing ever waits for a result that cannot come.
``multiprocessing.Pool`` replaces a killed worker and waits for the lost task for ever.

Small parts of a message go through the pipe, arrays and long bytes through shared memory: a pipe copies every
byte into the kernel and out again, while a mapping made before the fork is written once and read there.

A worker holds one block at a time, and the blocks that are neither given out nor written are bounded, so
memory does not grow with the input.
"""

import mmap
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
from megatron.training.processes.workers import ignore_signals, starting_workers

_ALIGNMENT = 64


class SharedSlots:
    """Pieces of memory shared by this process and its forks.

    Args:
        count: number of slots; 0 where processes do not begin as forks, and then all goes through the pipe.
        slot_bytes: size of each; pages that are never touched cost nothing.
    """

    def __init__(self, count: int, slot_bytes: int):
        self._slots = [memoryview(mmap.mmap(-1, slot_bytes)) for _ in range(count)]

    def __getitem__(self, number: int) -> memoryview:
        """The slot for message ``number``; messages share a slot when they are ``count`` apart."""
        return self._slots[number % len(self._slots)] if self._slots else memoryview(b"")


def send(connection: Connection, message: Any, slot: memoryview) -> None:
    """Send a message; its arrays go into ``slot`` or, if that is too small, behind it through the pipe."""
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    views = [array.raw() for array in arrays]
    starts, end = [], 0
    for view in views:
        starts.append(end)
        end += -(-view.nbytes // _ALIGNMENT) * _ALIGNMENT
    shared = end <= slot.nbytes
    if shared:
        for start, view in zip(starts, views, strict=True):
            slot[start : start + view.nbytes] = view
    connection.send_bytes(pickle.dumps((body, shared, [view.nbytes for view in views])))
    for view in () if shared else views:
        connection.send_bytes(view)


def receive(connection: Connection, slot: memoryview) -> Any:
    """Inverse of :func:`send`; arrays in the message are views of ``slot``, good until its next use."""
    body, shared, sizes = pickle.loads(connection.recv_bytes())
    if not shared:
        return pickle.loads(body, buffers=[connection.recv_bytes() for _ in sizes])
    views, start = [], 0
    for size in sizes:
        views.append(slot[start : start + size])
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return pickle.loads(body, buffers=views)


# Address space for one task or one result; a larger one takes the slower way through the pipe.
_SLOT_BYTES = 16 << 20


class WorkerFunction(Protocol):
    """Function that a worker applies to each task; built inside the worker."""

    facts: Any

    def __call__(self, task: Any, /) -> Any: ...


class WorkerError(MegatronError):
    """A worker process died, or its code failed."""


@dataclass(frozen=True)
class Failure:
    """An exception raised by a worker, passed to the reader of its results."""

    error: MegatronError

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        if isinstance(error, MegatronError):
            # Some of its subclasses cannot be unpickled; their message is what counts.
            portable = isinstance(error, PortableError)
            return cls(error if portable else MegatronError(str(error)))
        if isinstance(error, MemoryError):
            return cls(WorkerError("no memory left; try fewer --workers, or free some memory"))
        return cls(WorkerError(f"unexpected failure, please report it:\n{traceback.format_exc()}"))


class PortableError(MegatronError):
    """Base of errors that pass from process to process as they are: picklable, all fields in ``args``."""


Outcomes = Iterator[tuple[Any, Any]]


def map_here(work: Callable[[Any], Any], tasks: Iterator[Any]) -> Outcomes:
    """Do the work of :meth:`WorkerPool.map_in_order` in this process."""
    for task in tasks:
        yield task, _attempt(work, task)


class WorkerPool:
    """``workers`` processes, each with its own ``build()``.

    Args:
        build: makes the function; called once in each process. Picklable.
        workers: number of processes, at least 1.

    Attributes:
        facts: ``facts`` of the function that the first worker built.

    Raises:
        MegatronError: raised by ``build``, or a worker died in it.
    """

    def __init__(self, build: Callable[[], WorkerFunction], workers: int):
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
        """Wait for results, or for a death: the pipe of an idle worker is readable for no other reason."""
        by_handle: dict[Any, _Worker] = {worker.connection: worker for worker in self._workers}
        return [by_handle[handle] for handle in wait(list(by_handle))]


class _Supply:
    """The next task, made before a worker asks for it."""

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
    """The coordinator's side of one worker process."""

    def __init__(
        self,
        context: Any,
        number: int,
        build: Callable[[], WorkerFunction],
        slots: SharedSlots,
        inherited: list[Connection],
    ):
        self.number = number
        self.number_given = 0  # of the current task
        self._slots = slots
        self.connection, theirs = context.Pipe()
        # A fork inherits these; while it keeps them open, the death of their owners cannot be detected.
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
            raise WorkerError(self.death_message()) from None

    def result(self) -> Any:
        try:
            return receive(self.connection, self._slots[self.number_given])
        except (EOFError, ConnectionResetError):
            raise WorkerError(self.death_message()) from None

    def end(self, at_once: bool) -> None:
        if at_once:
            self.process.kill()
            return
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(None)

    def death_message(self) -> str:
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
    ours: Connection,
    not_ours: list[Connection],
    build: Callable[[], WorkerFunction],
    slots: SharedSlots,
    worker_index: int,
) -> None:
    """Body of a worker process: build, then take one task after the other until told to stop."""
    for connection in not_ours:
        connection.close()
    ignore_signals()
    try:
        # Messages printed while building (a fallback, a warning) are shown once, from the first worker.
        with _muted(worker_index > 0):
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
