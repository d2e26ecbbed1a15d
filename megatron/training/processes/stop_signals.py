"""Signals that end a run: one line says why, and the exit status is that of a shell.

Python calls handlers in the main thread only, between two of its instructions, and a main thread that waits
for another rank may never return from there. A second thread therefore receives every signal, too: it ends
the process where the main thread has not done so in time, and at once at the second Ctrl-C.

While a run trains with ``--exit-signal-handler``, signals are recorded instead, see ``dist_signal_handler``.

This module does not import torch, so that a script can call :func:`install` before that long import.
"""

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from megatron.training.processes import launcher
from megatron.training.processes.signal_thread import POLL_S, SignalThread
from megatron.training.processes.stop_report import (
    LAUNCHER_GONE,
    REPORT_S,
    UNWIND_S,
    StopReporter,
    describe_signal,
    exit_status,
)

if TYPE_CHECKING:
    from megatron.training.ranks.watcher import FailureWatcher

P = ParamSpec("P")
R = TypeVar("R")

BEFORE_TRAINING = "before training began: nothing to save"
# Signals with which a user, a scheduler, a closed terminal or a launcher ends a run.
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Time for the imports of a rank that was just started.
_IMPORT_S = 15.0
# One key press may arrive twice, from the terminal and from a program that passes it on.
_SAME_PRESS_S = 0.1


class StoppedBySignal(SystemExit):
    """Raised in the main thread. If it is not caught, the process ends quietly with its status."""

    def __init__(self, number: int):
        super().__init__(exit_status(number))


class Recorder(Protocol):
    """Records signals that do not end the run at once."""

    def record(self, number: int) -> None: ...


def installed() -> "StopSignals | None":
    """The object that handles signals in this process, found through Python's registered handlers."""
    for number in _ENDING:
        owner = getattr(signal.getsignal(number), "__self__", None)
        if isinstance(owner, StopSignals):
            return owner
    return None


def install(description: str = "") -> "StopSignals | None":
    """Handle signals from now on, unless another handler does; see :class:`StopSignals`.

    Args:
        description: end of the line about a stop until :attr:`StopSignals.describe` is replaced.

    Returns:
        The object in force; None outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    launcher.set_rank_variables()
    return installed() or StopSignals(description)


@contextlib.contextmanager
def unfinished(directory: str) -> Iterator[None]:
    """Context in which a directory is filled; an error or a signal removes it."""
    signals = installed()
    if signals is not None:
        signals.unfinished.add(directory)
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    finally:
        if signals is not None:
            signals.unfinished.discard(directory)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Context that a signal does not interrupt: the stop comes at its end. For blocks of milliseconds."""
    signals = installed()
    if signals is None:
        yield
        return
    with signals.held_back():
        yield


def answered(run: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a whole run: handles signals in it where no entry point of ours does already."""

    @functools.wraps(run)
    def run_with_signals(*args: P.args, **options: P.kwargs) -> R:
        signals = None if installed() else install(BEFORE_TRAINING)
        if signals is None:
            return run(*args, **options)
        try:
            signals.run(None)
            return run(*args, **options)
        except StoppedBySignal:
            sys.exit(signals.finish())
        except Exception:
            if signals.has_stopped():
                sys.exit(signals.finish())
            raise
        finally:
            signals.release()

    return run_with_signals


def raise_again() -> None:
    """Raise the pending stop instead of an error: some libraries turn it into an error of their own."""
    signals = installed()
    if signals is not None and signals.has_stopped():
        raise StoppedBySignal(signals.received)


class StopSignals:
    """Ends this process when a signal asks for it.

    Signals that are ignored (``nohup``), or that have another handler, stay as they are. A process that is
    forked from this one gets the previous handlers.

    Args:
        description: first result of :attr:`describe`.

    Attributes:
        describe: gives the end of the line about a stop: how far the run is and what was saved.
        recorder: takes the signals instead, while a run can save and stop by itself; None ends the run.
        received: number of the signal that ends this process, 0 before one has come.
        unfinished: directories to remove where the main thread cannot.
    """

    def __init__(self, description: str):
        self.describe: Callable[[], str] = lambda: description
        self.recorder: Recorder | None = None
        self.unfinished: set[str] = set()
        self._running = self._over = self._raised = self._is_early = self._leaving = False
        self.received, self._held = 0, 0
        self._deadline: float | None = None
        self._presses: list[float] = []  # when Ctrl-C was pressed
        self._ending = threading.Lock()
        self._reporter = StopReporter()
        self._previous: dict[int, Any] = {}
        self._thread = SignalThread(self._receive, self._check_deadline)
        for number in (*_ENDING, signal.SIGQUIT):
            before = signal.getsignal(number)
            free = before == signal.SIG_DFL and not _has_native_handler(number)
            if free or before == signal.default_int_handler:
                self._previous[number] = signal.signal(number, self._handle)
        self._masks: dict[int, set[int]] = {}
        os.register_at_fork(
            before=self._before_fork,
            after_in_parent=self._after_fork,
            after_in_child=self._release_in_child,
        )
        self._former_hook = sys.unraisablehook
        sys.unraisablehook = self._report_unraisable

    # Called in the main thread.

    def run(self, watcher: "FailureWatcher | None") -> None:
        """Let signals raise :class:`StoppedBySignal` in the main thread from now on.

        Args:
            watcher: through which the ranks agree on the one that reports, and end together.

        Raises:
            StoppedBySignal: a signal has come before.
        """
        self.end_with(watcher)
        self._running = True
        self._raise_if_due()

    def end_with(self, watcher: "FailureWatcher | None") -> None:
        """Let the ranks agree on the one that reports, and end together, from now on."""
        self._reporter.watcher = watcher

    def run_is_over(self) -> None:
        """Note that the run has ended or failed, and reports it itself: signals then only ensure its end."""
        self._over, self.recorder = True, None

    def has_stopped(self) -> bool:
        """Whether a signal is ending this process, so that other errors are its consequences."""
        return self._raised

    def finish(self) -> int:
        """Report the stop, if this rank is chosen to; returns the exit status.

        With other ranks, or when the thread was faster, the process ends in here.
        """
        self._over = True
        self.recorder = None
        if not self._ending.acquire(blocking=False):
            while True:  # the other thread is ending the process
                time.sleep(POLL_S)
        self._deadline = time.monotonic() + REPORT_S + UNWIND_S
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # data workers that end are no error any more
        self._report()
        if self._reporter.watcher is not None:
            self._leave(exit_status(self.received))
        return exit_status(self.received)

    def release(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            if getattr(signal.getsignal(number), "__self__", None) is self:
                signal.signal(number, handler)
        self._previous = {}
        sys.unraisablehook = self._former_hook
        self._thread.stop()

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """See the function of this name."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            self._raise_if_due()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        while self._leaving:  # the other thread is ending the process
            time.sleep(POLL_S)
        self._note(number)
        self._raise_if_due()

    def _raise_if_due(self) -> None:
        if self.received and self._running and not (self._over or self._held or self._raised):
            self._raised = True
            raise StoppedBySignal(self.received)

    def _report_unraisable(self, unraisable: Any) -> None:
        """Ignore a stop raised in a destructor, where Python drops it; the other thread knows of it."""
        if not isinstance(unraisable.exc_value, StoppedBySignal):
            self._former_hook(unraisable)

    def _before_fork(self) -> None:
        """A signal to the new process waits there until it has handlers of its own."""
        self._masks[threading.get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, self._previous)

    def _after_fork(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.pop(threading.get_ident()))

    def _release_in_child(self) -> None:
        if installed() is self:
            self._thread.forget()
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous = {}
        self._after_fork()

    # Called in both threads: the order in which they receive a signal is not known.

    def _note(self, number: int) -> None:
        if number == signal.SIGQUIT:
            return
        if self.recorder is not None:
            self.recorder.record(number)
        elif not self.received:
            self.received, self._is_early = number, not self._running
            self._deadline = time.monotonic() + self._grace_s()

    def _grace_s(self) -> float:
        """How long the main thread may take to end the process by itself."""
        if self._running:
            return REPORT_S if self._over else UNWIND_S
        # A single process need not wait until its imports are done to end together with others.
        return _IMPORT_S if launcher.has_other_ranks() else 0.0

    # Called in the second thread.

    def _receive(self, number: int) -> None:
        if number != LAUNCHER_GONE and number not in self._previous:
            return
        if self._is_second_press(number):
            self._leave_at_once(signal.SIGINT, launcher_gone=number == LAUNCHER_GONE)
        elif number == signal.SIGQUIT:
            self._leave_at_once(number)
        self._note(number)

    def _is_second_press(self, number: int) -> bool:
        """Whether this is another Ctrl-C; torchrun leaves at the second one too, and cannot pass it on."""
        if number not in (signal.SIGINT, LAUNCHER_GONE):
            return False
        now = time.monotonic()
        # Processes made by torch.multiprocessing get a SIGINT when their parent ends: one event.
        again = bool(self._presses) and now - self._presses[-1] >= _SAME_PRESS_S
        if number == signal.SIGINT and (again or not self._presses):
            self._presses.append(now)
        return again

    def _check_deadline(self) -> float:
        """End the process if the main thread is late; returns the seconds until the next check."""
        if self._deadline is None:
            return POLL_S
        left = self._deadline - time.monotonic()
        if left <= 0 and not self._held:
            self._end_here()
        return min(POLL_S, max(0.01, left))

    def _end_here(self) -> None:
        """End the process in place of the main thread, which has not returned or not finished."""
        if self._ending.acquire(blocking=False):
            reported_elsewhere, self._over = self._over, True
            if not reported_elsewhere:
                self._report()
        for directory in list(self.unfinished):
            shutil.rmtree(directory, ignore_errors=True)
        self._leave(exit_status(self.received))

    def _leave_at_once(self, number: int, launcher_gone: bool = False) -> None:
        self._over = True
        self._ending.acquire(blocking=False)  # the main thread reports nothing from here on
        self._leaving = True
        main_thread = threading.main_thread().ident
        assert main_thread is not None, "it has been started"
        signal.pthread_kill(main_thread, number)
        event = "a second SIGINT" if number == signal.SIGINT else describe_signal(number)
        line = f"stopped at once by {event}, whatever was being done; {self._description()}"
        self._reporter.stop_all_at_once(number, line, launcher_gone)
        self._leave(exit_status(number))

    # Called in the thread that ends the process.

    def _report(self) -> None:
        self._reporter.stop_all(self.received, self._line, self._is_early)

    def _line(self) -> str:
        return f"stopped by {describe_signal(self.received)} {self._description()}".strip()

    def _description(self) -> str:
        try:
            return self.describe()
        except Exception as error:  # it reads the arguments and the disk, at any moment
            return f"(how far the run was is not known: {error!r})"

    @staticmethod
    def _leave(status: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(status)


def _has_native_handler(number: int) -> bool:
    """Whether a library catches a signal without Python's knowledge, as ``faulthandler.register`` does."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
