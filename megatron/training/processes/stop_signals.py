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
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

from megatron.training.processes import launcher
from megatron.training.ranks.failure import FirstOnHost

if TYPE_CHECKING:
    from megatron.training.ranks.watcher import FailureWatcher

P = ParamSpec("P")
R = TypeVar("R")

BEFORE_TRAINING = "before training began: nothing to save"
# The end of the launcher, as a number among those of signals, which are all below it.
LAUNCHER_GONE = 100
# Signals with which a user, a scheduler, a closed terminal or a launcher ends a run.
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Time for the main thread to unwind, for the imports of a rank that was just started, and for the report.
_UNWIND_S, _IMPORT_S, _REPORT_S = 2.0, 15.0, 6.0
# One key press may arrive twice, from the terminal and from a program that passes it on.
_SAME_PRESS_S = 0.1
_POLL_S, _BRIEFLY_S, _HOLD_S, _AT_ONCE_S = 1.0, 0.5, 1.5, 4.0


class StoppedBySignal(SystemExit):
    """Raised in the main thread. If it is not caught, the process ends quietly with its status."""

    def __init__(self, number: int):
        super().__init__(exit_status(number))


class Recorder(Protocol):
    """Records signals that do not end the run at once."""

    def record(self, number: int) -> None: ...


def exit_status(number: int) -> int:
    """128 + number, as shells have it; the end of the launcher counts as a hang-up."""
    return 128 + (signal.SIGHUP if number == LAUNCHER_GONE else number)


def describe_signal(number: int) -> str:
    """Name of a signal, for messages."""
    return "the end of its launcher" if number == LAUNCHER_GONE else signal.Signals(number).name


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
        self._watcher: FailureWatcher | None = None
        self.unfinished: set[str] = set()
        self._running = self._over = self._raised = self._is_early = self._leaving = False
        self.received, self._held = 0, 0
        self._deadline: float | None = None
        self._presses: list[float] = []  # when Ctrl-C was pressed
        self._ending = threading.Lock()
        words = [os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
        self._first_on_host = FirstOnHost(f"signals {' '.join(words)}")
        self._previous: dict[int, Any] = {}
        self._listen()
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
        self._watcher = watcher

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
                time.sleep(_POLL_S)
        self._deadline = time.monotonic() + _REPORT_S + _UNWIND_S
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # data workers that end are no error any more
        self._report_together()
        if self._watcher is not None:
            self._leave(exit_status(self.received))
        return exit_status(self.received)

    def release(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            if getattr(signal.getsignal(number), "__self__", None) is self:
                signal.signal(number, handler)
        self._previous = {}
        sys.unraisablehook = self._former_hook
        if self._wakeup >= 0:
            signal.set_wakeup_fd(self._former_wakeup)
            os.close(self._wakeup)  # which ends the thread
            self._wakeup = -1

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
            time.sleep(_POLL_S)
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
            signal.set_wakeup_fd(-1)
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous, self._wakeup = {}, -1
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
            return _REPORT_S if self._over else _UNWIND_S
        # A single process need not wait until its imports are done to end together with others.
        return _IMPORT_S if launcher.has_other_ranks() else 0.0

    # Called in the second thread.

    def _listen(self) -> None:
        """Start the thread; Python's handler writes each signal into a pipe."""
        self._wakeup = self._former_wakeup = -1
        reading, wakeup = map(launcher.above_standard_streams, os.pipe())
        os.set_blocking(wakeup, False)
        self._former_wakeup = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        self._wakeup = wakeup
        watch = launcher.LauncherWatch()
        threading.Thread(target=self._watch, args=(reading, watch), name="signals", daemon=True).start()

    def _watch(self, reading: int, launcher_watch: launcher.LauncherWatch) -> None:
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        for descriptor in launcher_watch.descriptors:
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = dict(poll.poll(self._poll_timeout() * 1000))
            if reading in ready:
                numbers = os.read(reading, 4096)
                if not numbers:
                    os.close(reading)
                    return
                for number in numbers:
                    self._receive(number)
            if launcher_watch.is_gone():
                for descriptor in launcher_watch.descriptors:
                    poll.unregister(descriptor)
                launcher_watch.forget()
                self._receive(LAUNCHER_GONE)
            if self._deadline is not None and time.monotonic() >= self._deadline and not self._held:
                self._end_here()

    def _poll_timeout(self) -> float:
        """Seconds until the next check that no descriptor triggers."""
        if self._deadline is None:
            return _POLL_S
        return min(_POLL_S, max(0.01, self._deadline - time.monotonic()))

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

    def _end_here(self) -> None:
        """End the process in place of the main thread, which has not returned or not finished."""
        if self._ending.acquire(blocking=False):
            reported_elsewhere, self._over = self._over, True
            if not reported_elsewhere:
                self._report_together()
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
        if self._watcher is None:
            self._print_line(line)
        elif launcher_gone:  # and the store with it
            if os.environ.get("LOCAL_RANK", "0") == "0":
                self._print_line(line)
        else:
            # Otherwise the other ranks would report this one as lost; ending them takes only a moment.
            self._watcher.stop_all(exit_status(number), lambda: line, _BRIEFLY_S, _AT_ONCE_S)
            self._print_line(line)
        self._leave(exit_status(number))

    # The report.

    def _report_together(self) -> None:
        """Print the line on one rank, and end all."""
        number, watcher = self.received, self._watcher
        if watcher is not None and number != LAUNCHER_GONE:
            # Ranks that receive a signal during their imports reach this one after the other.
            if self._is_early and not self._first_on_host.claim():
                return
            watcher.stop_all(exit_status(number), self._line, _UNWIND_S, _REPORT_S)
            self._print_line(self._line())
            return
        # Ranks without a rendezvous, or whose store has gone with the launcher, decide each on its own.
        if number == LAUNCHER_GONE:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                self._print_line(self._line())
        elif not launcher.has_other_ranks():
            self._print_line(self._line())
        elif self._first_on_host.claim():
            self._print_line(self._line())
            time.sleep(_HOLD_S)  # others reach this a little later

    def _line(self) -> str:
        return f"stopped by {describe_signal(self.received)} {self._description()}".strip()

    def _description(self) -> str:
        try:
            return self.describe()
        except Exception as error:  # it reads the arguments and the disk, at any moment
            return f"(how far the run was is not known: {error!r})"

    @staticmethod
    def _print_line(line: str) -> None:
        """Print one line to stderr after flushing stdout, without the lock of an interrupted print."""
        _within(_BRIEFLY_S, lambda: bool(sys.stdout.flush()))
        where = f"[{launcher.describe()}] " if launcher.has_other_ranks() else ""
        with contextlib.suppress(OSError):
            os.write(2, f"{where}error: {line}\n".encode())

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


def _within(seconds: float, ask: Callable[[], bool]) -> bool:
    """Result of ``ask``, or True where it takes too long: the other end may be gone or stuck."""
    answers = []

    def answer() -> None:
        with contextlib.suppress(Exception):
            answers.append(ask())

    asking = threading.Thread(target=answer, daemon=True)
    asking.start()
    asking.join(seconds)
    return answers[0] if answers else True
