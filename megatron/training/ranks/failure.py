"""A failure as a value, and the end of a process."""

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from megatron.training.ranks.places import Place

ERROR, CONSEQUENCE, STOP = range(3)
# How long a failing rank waits for rank 0, and for an answer of the store, before it speaks for itself.
PATIENCE_S = 10.0
# How long the process that speaks for a machine keeps others from it.
HOLD_S = 2.0


@dataclass(frozen=True)
class Failure:
    """Why this rank wants all to end.

    Attributes:
        status: exit status for all.
        text: what to say; made only if this rank is the one that speaks. None for what the records of all
            ranks tell.
        kind: what another rank knows better comes first: its own ``ERROR``, then a ``CONSEQUENCE`` of what
            happened elsewhere, then a ``STOP`` by a signal, which a launcher may send for such a reason.
        error: what torch said, where it is a consequence.
        patience_s: how long to wait for a rank 0 that has not come yet.
        place: what the main thread was doing; None if it may still be at it.
        at: when, on the clock of this process.
    """

    status: int
    text: Callable[[], str] | None
    kind: int = ERROR
    error: str = ""
    patience_s: float = PATIENCE_S
    place: Place | None = None
    at: float = field(default_factory=time.monotonic)


def say(text: str) -> None:
    """A line that does not end the run."""
    print(text, file=sys.stderr, flush=True)


def end_process(status: int) -> None:
    """Leave at once: threads of process groups wait for ranks that are gone, and the main thread may, too."""

    def flush() -> None:
        sys.stdout.flush()
        sys.stderr.flush()

    for child in multiprocessing.active_children():
        child.kill()
    flushing = threading.Thread(target=flush, daemon=True)  # nobody may read what is written
    flushing.start()
    flushing.join(1.0)
    os._exit(status)
