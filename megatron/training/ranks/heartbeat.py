"""Heartbeats: records that every rank keeps renewing in the store, and the reading of others' records.

A store can outlive the processes that wrote to it: torchrun keeps one over its restarts. A record therefore
counts only while it changes, and every process signs its own with a word that no other uses.
"""

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed import Store

from megatron.training.ranks import stack_location
from megatron.training.ranks.failure import Failure
from megatron.training.ranks.stack_location import StackLocation
from megatron.training.ranks.store import StoreAddress, WatchedStore

_BLANK = "-"
# Other processes seen writing a record before it is taken for a second one of the same rank.
_FOREIGN_WRITES = 2
# Time between two heartbeats during the rendezvous, and afterwards.
RENDEZVOUS_INTERVAL_S, INTERVAL_S = 0.1, 0.5
# Most requests per second that all ranks together send to the store.
_REQUESTS_PER_S = 1000


class Process(NamedTuple):
    """Identity of one process, different from that of a later one with the same number.

    Attributes:
        host: name for people; two machines may share it.
        machine: what processes that see each other have in common.
        pid: number of the process.
        started: when it was started, in clock ticks since the machine was; "" where that is not known.
    """

    host: str
    machine: str
    pid: int
    started: str

    @classmethod
    def own(cls) -> "Process":
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, _status(pid)[1])

    def condition(self) -> str:
        """``runs``, ``stopped`` (by a signal or a debugger), ``ended``, or ``unknown`` on another machine."""
        if self.machine != _machine():
            return "unknown"
        if not os.path.isdir("/proc/self"):
            return "runs" if _takes_signals(self.pid) else "ended"
        letter, started = _status(self.pid)
        if letter in ("", "Z", "X") or started != self.started:
            return "ended"
        return "stopped" if letter in "Tt" else "runs"


@cache
def _machine() -> str:
    """Boot of the machine and namespace of the process numbers; the host's name where neither is known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _status(pid: int) -> tuple[str, str]:
    """(letter of the state, start time) from the system's table; empty for no such process."""
    try:
        # The second field is the name in brackets, which may hold blanks and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _takes_signals(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True)
class Heartbeat:
    """What one rank reports about itself.

    Attributes:
        nonce: random word that only this process uses.
        number: counts the writes.
        process: identity of the process.
        world_size: number of ranks that this one was started with.
        joined: nonce of the rank 0 whose rendezvous this rank has joined; "" before.
        location: what its main thread is doing.
        end: "" while it runs, ``well``, or how it left.
        detailed: whether the location was written after a failure became known.
    """

    nonce: str
    number: int
    process: Process
    world_size: int
    joined: str = ""
    location: StackLocation = field(default_factory=lambda: StackLocation("", "", False))
    end: str = ""
    detailed: bool = False

    def encode(self) -> str:
        return json.dumps({**asdict(self), "process": [*self.process], "location": [*self.location]})

    @classmethod
    def decode(cls, text: str) -> "Heartbeat | None":
        """The record in a text; None for another text, such as that of an earlier version."""
        try:
            words = json.loads(text)
            return cls(
                **{
                    **words,
                    "process": Process(*words["process"]),
                    "location": StackLocation(*words["location"]),
                }
            )
        except (ValueError, TypeError, KeyError):
            return None


class HeartbeatTable:
    """The heartbeats of all ranks in the store, of which this rank writes its own.

    Args:
        store: of the rendezvous.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, store: Store | WatchedStore, rank: int, world_size: int):
        self._store, self._rank = store, rank
        self._own = Heartbeat(uuid.uuid4().hex[:12], 0, Process.own(), world_size)
        self._written = ""
        self._foreign = 0
        self._exist: set[int] = set()

    @property
    def own(self) -> Heartbeat:
        """The heartbeat of this rank, as written last."""
        return self._own

    def write(self, **changes: object) -> Heartbeat | None:
        """Renew the heartbeat of this rank.

        Returns:
            The heartbeat of another process that has the same rank, once that is certain.
        """
        self._own = Heartbeat(**{**self._own.__dict__, "number": self._own.number + 1, **changes})
        text = self._own.encode()
        expected = self._written
        for _ in range(3):
            found = self._store.compare_set(_key(self._rank), expected, text).decode()
            if found == text:
                break
            if self._written and found != _BLANK:
                self._foreign += 1
            expected = found
        first, self._written = not self._written, text
        if first or self._foreign < _FOREIGN_WRITES:
            return None
        return Heartbeat.decode(expected)

    def read(self, rank: int) -> Heartbeat | None:
        """The heartbeat of one rank, None if it has written none."""
        return self.read_all([rank])[0]

    def read_all(self, ranks: Sequence[int]) -> list[Heartbeat | None]:
        """Heartbeats of several ranks in one request; the first read of a rank costs one more."""
        self._create(ranks)
        values = self._store.multi_get([_key(rank) for rank in ranks]) if ranks else []
        return [Heartbeat.decode(value.decode()) for value in values]

    def _create(self, ranks: Iterable[int]) -> None:
        """Write blank records where there are none: reading a key that does not exist would wait for it."""
        for rank in set(ranks) - self._exist:
            self._store.compare_set(_key(rank), "", _BLANK)
            self._exist.add(rank)


def _key(rank: int) -> str:
    return f"heartbeat_{rank}"


class Session:
    """This rank's view of one attempt to run the job. Only the store's thread uses it.

    An attempt has the nonce of its rank 0 as its name, and ranks exchange everything under keys below that
    name: restarts of torchrun share one store, and what earlier attempts left there must not count.

    Args:
        store: of the rendezvous.
        rank: of this process.
        world_size: number of ranks.
        address: of the store.
        failure: gives the failure that this rank knows of, None while there is none.

    Attributes:
        attempt: name of the attempt, "" while rank 0 has not been seen.
        all_joined: whether all ranks have joined the rendezvous.
        heartbeats: of all ranks.
    """

    def __init__(
        self,
        store: WatchedStore,
        rank: int,
        world_size: int,
        address: StoreAddress,
        failure: Callable[[], Failure | None],
    ):
        self.rank, self.world_size, self.address, self.failure = rank, world_size, address, failure
        self.heartbeats = HeartbeatTable(store, rank, world_size)
        self.attempt = self.heartbeats.own.nonce if rank == 0 else ""
        self.all_joined = False
        self._store = store

    @property
    def own(self) -> Heartbeat:
        """The heartbeat of this rank."""
        return self.heartbeats.own

    @property
    def interval_s(self) -> float:
        """Time between two heartbeats."""
        return max(
            INTERVAL_S if self.all_joined else RENDEZVOUS_INTERVAL_S, self.world_size / _REQUESTS_PER_S
        )

    def shared(self) -> WatchedStore:
        """Keys of this attempt; before rank 0 is known, of this restart of torchrun."""
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return self._store.below(self.attempt or f"without rank 0, restart {restart}")

    def renew(self, **changes: Any) -> Heartbeat | None:
        """Renew the heartbeat of this rank; see ``HeartbeatTable.write``."""
        location = own_location(self.failure(), bool(changes.get("detailed")))
        return self.heartbeats.write(location=location, **changes)

    def wait(self, seconds: float, done: Callable[[], bool] = lambda: False, **changes: Any) -> bool:
        """Wait and keep renewing the heartbeat; True as soon as ``done`` is."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if done():
                return True
            self.renew(**changes)
            time.sleep(min(0.2, self.interval_s))
        return done()


def own_location(failure: Failure | None, detail: bool = False) -> StackLocation:
    """What the main thread is doing, or was doing when it failed."""
    if failure is not None and failure.location is not None:
        return failure.location
    return stack_location.main_thread_location(iteration(), detail)


def iteration() -> int | None:
    """Finished iterations when the latest step of the run began, None before it trains."""
    find = getattr(sys.modules.get("megatron.training.global_vars"), "get_args", None)
    try:
        return getattr(find(), "curr_iteration", None) if find else None
    except AssertionError:  # no arguments yet
        return None
