"""The line that says which signal stopped a run: which of the ranks prints it, and how.

This module does not import torch: ranks are stopped during that import, too.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron.training.processes import launcher
from megatron.training.ranks.failure import FirstOnHost

if TYPE_CHECKING:
    from megatron.training.ranks.watcher import FailureWatcher

# The end of the launcher, as a number among those of signals, which are all below it.
LAUNCHER_GONE = 100
# Time for the main thread of a rank to unwind, and for the report.
UNWIND_S, REPORT_S = 2.0, 6.0
# Likewise where a second Ctrl-C ends all at once.
_UNWIND_AT_ONCE_S, _REPORT_AT_ONCE_S = 0.5, 4.0
# How long a full pipe may delay the line.
_FLUSH_S = 0.5
# How long the process that reports for a machine keeps others from it.
_HOLD_S = 1.5


def exit_status(number: int) -> int:
    """128 + number, as shells have it; the end of the launcher counts as a hang-up."""
    return 128 + (signal.SIGHUP if number == LAUNCHER_GONE else number)


def describe_signal(number: int) -> str:
    """Name of a signal, for messages."""
    return "the end of its launcher" if number == LAUNCHER_GONE else signal.Signals(number).name


class StopReporter:
    """Prints the line about a stop on one of the ranks that stop.

    Attributes:
        watcher: through which the ranks agree on the one that prints, and end together; None before they
            have met.
    """

    def __init__(self) -> None:
        self.watcher: FailureWatcher | None = None
        words = [os.environ.get(name, "") for name in ("MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")]
        self._first_on_host = FirstOnHost(f"signals {' '.join(words)}")

    def stop_all(self, number: int, line: Callable[[], str], is_early: bool) -> None:
        """End all ranks after one of them has printed the line. Returns where this one has to end itself.

        Args:
            number: the signal, or ``LAUNCHER_GONE``.
            line: makes the line, if this rank is chosen to print it.
            is_early: whether the signal came while this rank was still starting.
        """
        watcher = self.watcher
        if watcher is not None and number != LAUNCHER_GONE:
            # Ranks that receive a signal during their imports reach this one after the other.
            if is_early and not self._first_on_host.claim():
                return
            watcher.stop_all(exit_status(number), line, UNWIND_S, REPORT_S)
            _print_line(line())
            return
        # Ranks without a rendezvous, or whose store has gone with the launcher, decide each on its own.
        if number == LAUNCHER_GONE:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                _print_line(line())
        elif not launcher.has_other_ranks():
            _print_line(line())
        elif self._first_on_host.claim():
            _print_line(line())
            time.sleep(_HOLD_S)  # others reach this a little later

    def stop_all_at_once(self, number: int, line: str, launcher_gone: bool) -> None:
        """As ``stop_all``, without waiting for main threads.

        Args:
            number: the signal that gives the exit status.
            line: what to print.
            launcher_gone: whether the end of the launcher was the second event, and the store went with it.
        """
        if self.watcher is None:
            _print_line(line)
        elif launcher_gone:
            if os.environ.get("LOCAL_RANK", "0") == "0":
                _print_line(line)
        else:
            # Otherwise the other ranks would report this one as lost; ending them takes only a moment.
            self.watcher.stop_all(exit_status(number), lambda: line, _UNWIND_AT_ONCE_S, _REPORT_AT_ONCE_S)
            _print_line(line)


def _print_line(line: str) -> None:
    """Print one line to stderr after flushing stdout, without the lock of an interrupted print."""
    _flush_stdout()
    where = f"[{launcher.describe()}] " if launcher.has_other_ranks() else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{where}error: {line}\n".encode())


def _flush_stdout() -> None:
    """Flush stdout, unless that takes too long: the reader of its pipe may be gone or stuck."""

    def flush() -> None:
        with contextlib.suppress(Exception):
            sys.stdout.flush()

    flushing = threading.Thread(target=flush, daemon=True)
    flushing.start()
    flushing.join(_FLUSH_S)
