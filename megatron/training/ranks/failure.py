"""Why a rank wants all to end, which process of a machine reports it, and the end of the process."""

import contextlib
import hashlib
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, which a process that fails early need not do
    from megatron.training.ranks.stack_location import StackLocation

ERROR, CONSEQUENCE, STOP = range(3)
# How long a failing rank waits for rank 0, and for an answer of the store, before it reports by itself.
GRACE_S = 10.0
# How long the process that reports for a machine keeps others from it.
HOLD_S = 2.0


@dataclass(frozen=True)
class Failure:
    """Why this rank wants all ranks to end.

    Attributes:
        status: exit status for all.
        text: makes the report, if this rank is the one to give it. None: the report follows from the
            heartbeats of all ranks.
        kind: ``ERROR`` of this rank, ``CONSEQUENCE`` of what happened in another, or ``STOP`` by a signal,
            which a launcher may send for such a reason. The lowest kind in the job is the one reported.
        error: message of torch, for a consequence.
        grace_s: how long to wait for a rank 0 that has not started yet.
        location: what the main thread was doing; None if it may still be doing it.
        at: time of the failure, of ``time.monotonic``.
    """

    status: int
    text: Callable[[], str] | None
    kind: int = ERROR
    error: str = ""
    grace_s: float = GRACE_S
    location: "StackLocation | None" = None
    at: float = field(default_factory=time.monotonic)


def print_line(text: str) -> None:
    """Print a line to stderr; the run goes on."""
    print(text, file=sys.stderr, flush=True)


class FirstOnHost:
    """Chooses one process of a machine to report, where ranks cannot agree through the store.

    The first process to bind an abstract socket name keeps it until it ends; no file stays behind.
    """

    def __init__(self, name: str):
        self._name, self._socket = name, None

    def claim(self) -> bool:
        """True for the first process; True for all where the system has no such names."""
        if self._socket is not None:
            return True
        if not hasattr(socket, "AF_UNIX"):
            return True
        digest = hashlib.sha256(self._name.encode()).hexdigest()[:32]  # such names are short
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            bound.bind(f"\0megatron {digest}")
        except FileNotFoundError:  # a system with such sockets, but not with such names
            bound.close()
            return True
        except OSError:
            bound.close()
            return False
        self._socket = bound
        return True

    def release(self) -> None:
        """Let another process be the first."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None


def end_process(status: int) -> None:
    """Exit at once, without waiting for threads: those of process groups may wait for ranks that are gone."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    for child in multiprocessing.active_children():
        child.kill()
    flushing = threading.Thread(target=flush, daemon=True)  # it blocks where a full pipe has no reader
    flushing.start()
    flushing.join(1.0)
    os._exit(status)
