"""One rank's part in the records of all: its own, the name of the attempt, and how it waits."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from megatron.training.ranks import places
from megatron.training.ranks.beats import Beat, Beats
from megatron.training.ranks.failure import Failure
from megatron.training.ranks.places import Place
from megatron.training.ranks.store import Address, WatchedStore

MEETING_INTERVAL_S, INTERVAL_S = 0.1, 0.5
# Questions per second that the store is to answer, at most.
_QUESTIONS_PER_S = 1000


class Session:
    """What the parts of the thread that asks the store share. Only that thread uses it.

    Rank 0 gives an attempt its name, the nonce of its process, and everything that ranks tell each other
    lies below that name: restarts of torchrun share one store, and what earlier attempts left there must not
    count.

    Args:
        store: of the rendezvous.
        rank: of this process.
        world_size: number of ranks.
        address: of the store.
        failure: what has gone wrong in this rank, None while nothing has.

    Attributes:
        attempt: name of the attempt, "" while rank 0 has not been seen.
        met: whether all ranks have come.
        beats: the records.
    """

    def __init__(
        self,
        store: WatchedStore,
        rank: int,
        world_size: int,
        address: Address,
        failure: Callable[[], Failure | None],
    ):
        self.rank, self.world_size, self.address, self.failure = rank, world_size, address, failure
        self.beats = Beats(store, rank, world_size)
        self.attempt = self.beats.own.nonce if rank == 0 else ""
        self.met = False
        self._store = store

    @property
    def own(self) -> Beat:
        """The record of this rank."""
        return self.beats.own

    @property
    def interval_s(self) -> float:
        """Time between two signs of life."""
        return max(INTERVAL_S if self.met else MEETING_INTERVAL_S, self.world_size / _QUESTIONS_PER_S)

    def shared(self) -> WatchedStore:
        """What the ranks of this attempt share; before rank 0 has come, of this restart of torchrun."""
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return self._store.part(self.attempt or f"without rank 0, restart {restart}")

    def beat(self, **changes: Any) -> Beat | None:
        """Give a sign of life; see ``Beats.write``."""
        place = own_place(self.failure(), bool(changes.get("detailed")))
        return self.beats.write(place=place, **changes)

    def wait(self, seconds: float, done: Callable[[], bool] = lambda: False, **changes: Any) -> bool:
        """Wait while others see that this rank lives; True as soon as ``done`` is."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if done():
                return True
            self.beat(**changes)
            time.sleep(min(0.2, self.interval_s))
        return done()


def own_place(failure: Failure | None, detail: bool = False) -> Place:
    """What the main thread does, or what it did when it failed."""
    if failure is not None and failure.place is not None:
        return failure.place
    return places.of_main_thread(iteration(), detail)


def iteration() -> int | None:
    """Finished iterations when the latest step of the run began, None before it trains."""
    find = getattr(sys.modules.get("megatron.training.global_vars"), "get_args", None)
    try:
        return getattr(find(), "curr_iteration", None) if find else None
    except AssertionError:  # no arguments yet
        return None
