"""The thread that owns a rank's connection to the store of the rendezvous."""

import os
import threading
import time
from collections.abc import Iterable
from typing import Protocol

from torch.distributed import PrefixStore, Store

from megatron.training.ranks import report
from megatron.training.ranks.failure import CONSEQUENCE, Failure, end_process
from megatron.training.ranks.heartbeat import Heartbeat, Session
from megatron.training.ranks.rendezvous import Rendezvous, missing_ranks
from megatron.training.ranks.report import describe_rank
from megatron.training.ranks.store import (
    ConnectionProbe,
    StoreAddress,
    StoreUnavailable,
    WatchedStore,
    connect,
    first_line,
)

# Longest wait of the store's process for the other ranks at the end of a run.
END_S = 5.0
# Time between two checks of all ranks by rank 0; also what a rank that has left gives the others to leave.
FULL_CHECK_S = 5.0
# In jobs of up to this many ranks, all heartbeats are read to find those of this machine.
_SMALL_WORLD = 64


class Owner(Protocol):
    """Interface of the watcher that owns the thread."""

    time_limit_s: float

    @property
    def failure(self) -> Failure | None: ...

    def note_failure(self, failure: Failure) -> None: ...

    def report(self) -> None: ...


class StoreThread:
    """The thread that sends all requests to the store: heartbeats, the rendezvous, and failures.

    Args:
        owner: is notified of what this thread finds.
        rank: of this process.
        world_size: number of ranks.
        address: of the store.

    Attributes:
        all_joined: set when all ranks have joined the rendezvous.
        local_ranks: last heartbeats of other ranks on this machine.
        to_check: ranks whose process has ended, and whose heartbeat has not been read since.
        problem: why there is no connection.
        lost: why there is no connection any more; "" while there is.
    """

    def __init__(self, owner: Owner, rank: int, world_size: int, address: StoreAddress):
        self._owner, self._rank, self._world_size, self._address = owner, rank, world_size, address
        self.all_joined = threading.Event()
        self.local_ranks: dict[int, Heartbeat] = {}
        self.to_check: list[int] = []
        self.problem, self.lost = "the store of the job has not been reached", ""
        self._over, self._wake, self._end = threading.Event(), threading.Event(), ""
        self._store: WatchedStore | None = None
        self._session: Session | None = None
        self._arguments: dict[str, str] | None = None
        self._rendezvous: Rendezvous | None = None
        self._notice = ""
        self._rank_0: Heartbeat | None = None
        self._silence: dict[int, tuple[Heartbeat, float]] = {}
        self._left: dict[int, float] = {}
        self._checked_all_at = self._read_local_at = 0.0
        self._thread = threading.Thread(target=self._serve, name="rank-store", daemon=True)

    # Called by the owner, in other threads.

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, end: str) -> None:
        """End the thread; the heartbeat of this rank says how the run ended."""
        self._end = end
        self._over.set()
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread."""
        self._thread.join(timeout_s)

    def wake(self) -> None:
        """Start the next round now."""
        self._wake.set()

    @property
    def connected(self) -> bool:
        """Whether there is, or was, a connection."""
        return self._session is not None

    def begin_rendezvous(self, arguments: dict[str, str]) -> None:
        """Join the rendezvous; ``all_joined`` is set when all ranks have."""
        self._arguments = arguments
        self._wake.set()

    def request_notice(self, text: str) -> None:
        """Let one rank print which ranks are missing, followed by ``text``."""
        self._notice = text
        self._wake.set()

    def check_rank(self, rank: int) -> None:
        """Read from the heartbeat of a rank, whose process has ended, whether its run had ended."""
        self.to_check.append(rank)
        self._wake.set()

    def silent_polls(self) -> int:
        """How many times in a row this was called while one request to the store had no reply."""
        return 0 if self._store is None else self._store.silent_polls()

    def rank_0_died(self) -> bool:
        """Whether rank 0 kept the store and has not ended its run; asked once the store is gone."""
        heartbeat = self._rank_0
        return (
            not self._address.by_launcher and self._rank != 0 and heartbeat is not None and not heartbeat.end
        )

    def new_store(self) -> Store:
        """A second connection, for process groups, with keys of this attempt alone; reads may block in it."""
        store = connect(self._address, self._over, lambda _: None)
        assert store is not None, "this run is not over"
        return PrefixStore(f"attempt_{self._joined_session().attempt}", store)

    def missing_ranks(self) -> str:
        """Names the ranks that have not joined the rendezvous."""
        if threading.current_thread() is not self._thread:
            return f"other ranks: {self._address.silence()}"
        return missing_ranks(self._joined_session())

    def explain(self, error: str) -> str:
        """What the heartbeats of all ranks show; for calls in this thread only."""
        return report.explanation(self._joined_session(), error)

    def _joined_session(self) -> Session:
        assert self._session is not None, "asked for once there is a connection"
        return self._session

    # Body of the thread.

    def _serve(self) -> None:
        while not self._over.is_set() and not self.lost:
            try:
                self._serve_one_store()
            except StoreUnavailable as error:
                self.problem = str(error)
                self._owner.note_failure(Failure(1, lambda: self.problem, grace_s=0.0))
                return
            except RuntimeError as error:
                reason = (
                    f"the store of the job at {self._address}, which {self._address.keeper} kept, is gone"
                )
                if self._session is None or self._session.attempt or self._owner.failure is not None:
                    self.lost = f"{reason} ({first_line(error)})"
                else:  # the store of an attempt that ended as this process started: another may follow
                    self.problem, self._session, self._rendezvous, self._rank_0 = reason, None, None, None

    def _serve_one_store(self) -> None:
        store = connect(self._address, self._over, self._note_problem)
        if store is None:
            return
        self._store = WatchedStore(store, ConnectionProbe(self._address, self._world_size))
        self._session = Session(
            self._store, self._rank, self._world_size, self._address, lambda: self._owner.failure
        )
        while not self._over.is_set():
            self._do_round(self._session)
            self._wake.wait(self._session.interval_s)
            self._wake.clear()
        self._leave(self._session)

    def _note_problem(self, text: str) -> None:
        self.problem = text

    def _do_round(self, session: Session) -> None:
        """Renew the heartbeat, and check the other ranks."""
        other = session.renew()
        if other is not None:
            self._refuse_second_process(session, other)
        if self._rank != 0:
            self._check_rank_0(session)
        if self._arguments is not None and not session.all_joined:
            self._advance_rendezvous(session, self._arguments)
        self._read_local_ranks(session)
        self._check_ended(session)
        if self._rank == 0 and session.all_joined and time.monotonic() - self._checked_all_at > FULL_CHECK_S:
            self._checked_all_at = time.monotonic()
            self._check_all(session)
        failure = self._owner.failure
        alone = failure is not None and time.monotonic() - failure.at > failure.grace_s
        if report.failed(session) or alone or (failure is not None and session.attempt):
            self._end_all(session)

    def _end_all(self, session: Session) -> None:
        status, reports = report.choose_reporter(session, self._owner.failure)
        if reports:
            self._owner.report()
            report.mark_reported(session)
        report.leave(session)
        end_process(status)

    def _leave(self, session: Session) -> None:
        session.renew(end=self._end)
        if not session.attempt:
            return
        shared, deadline = session.shared(), time.monotonic() + END_S
        ended = shared.add("ended", 1)
        while self._address.hosted_here and ended < self._world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            ended = shared.add("ended", 0)

    def _refuse_second_process(self, session: Session, other: Heartbeat) -> None:
        both = sorted(f"process {p.pid} on {p.host}" for p in (session.own.process, other.process))
        text = f"RANK={self._rank} was given to two processes: {' and '.join(both)}. Start each rank once"
        self._owner.note_failure(Failure(1, lambda: text))

    def _advance_rendezvous(self, session: Session, arguments: dict[str, str]) -> None:
        self._rendezvous = self._rendezvous or Rendezvous(session, arguments)
        problem = self._rendezvous.advance()
        if problem:
            self._owner.note_failure(Failure(1, lambda: problem))
        if session.all_joined:
            self.all_joined.set()
        elif self._notice:
            self._rendezvous.notice(self._notice)
        self._notice = ""

    # Other ranks.

    def _check_rank_0(self, session: Session) -> None:
        """Take the name of the attempt from a rank 0 whose heartbeat changes."""
        before, heartbeat = self._rank_0, session.heartbeats.read(0)
        self._rank_0 = heartbeat
        if heartbeat is not None and 0 in self.local_ranks and self.local_ranks[0].nonce == heartbeat.nonce:
            self.local_ranks[0] = heartbeat
        self._note_silence(0, heartbeat, session.interval_s)
        if heartbeat is None or before is None or heartbeat.nonce != before.nonce:
            return
        if heartbeat.number == before.number or session.attempt == heartbeat.nonce:
            return
        if session.all_joined:
            text = f"{describe_rank(0, heartbeat)} has been started again during the run"
            self._owner.note_failure(Failure(1, lambda: text))
            return
        session.attempt = heartbeat.nonce
        if heartbeat.world_size != self._world_size:
            this, first = describe_rank(self._rank, session.own), describe_rank(0, heartbeat)
            text = (
                f"{this} was started with WORLD_SIZE={self._world_size}, but {first} with "
                f"WORLD_SIZE={heartbeat.world_size}: give all ranks the same number"
            )
            self._owner.note_failure(Failure(1, lambda: text))

    def _note_silence(self, rank: int, heartbeat: Heartbeat | None, passed_s: float) -> None:
        """Add up how long a heartbeat stays the same, less the time in which this process was stopped."""
        if heartbeat is None or heartbeat.end:
            return
        known, silent_s = self._silence.get(rank, (None, 0.0))
        same = known is not None and (known.nonce, known.number) == (heartbeat.nonce, heartbeat.number)
        silent_s = silent_s + passed_s if same else 0.0
        self._silence[rank] = (heartbeat, silent_s)
        if self.all_joined.is_set() and silent_s > self._owner.time_limit_s:
            self._owner.note_failure(Failure(1, None, CONSEQUENCE))

    def _read_local_ranks(self, session: Session) -> None:
        """Read heartbeats of ranks that may be on this machine: each until it has joined, then all rarely."""
        unknown = [rank for rank in self._possible_local_ranks() if rank not in self.local_ranks]
        if session.all_joined and time.monotonic() - self._read_local_at > FULL_CHECK_S:
            self._read_local_at = time.monotonic()
            unknown = list(self._possible_local_ranks())
        if not unknown or not session.attempt:
            return
        for rank, heartbeat in zip(unknown, session.heartbeats.read_all(unknown), strict=True):
            if heartbeat is not None and session.attempt in (heartbeat.joined, heartbeat.nonce):
                self.local_ranks[rank] = heartbeat

    def _possible_local_ranks(self) -> Iterable[int]:
        first, last = 0, self._world_size
        if self._world_size > _SMALL_WORLD:
            local, size = (os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
            if not (local.isdigit() and size.isdigit()):
                return ()
            first = max(self._rank - int(local), 0)
            last = min(first + int(size), self._world_size)
        return (rank for rank in range(first, last) if rank != self._rank)

    def _check_ended(self, session: Session) -> None:
        """Check ranks whose process has ended: the heartbeat says whether the run had ended before."""
        for rank in list(self.to_check):
            heartbeat, known = session.heartbeats.read(rank), self.local_ranks[rank]
            if heartbeat is None or (heartbeat.nonce == known.nonce and not heartbeat.end):
                self._owner.note_failure(Failure(1, None, CONSEQUENCE))
            elif heartbeat.end != "well":
                self._left.setdefault(rank, time.monotonic())
            self.to_check.remove(rank)
        if any(time.monotonic() - since > FULL_CHECK_S for since in self._left.values()):
            self._owner.note_failure(Failure(1, None, CONSEQUENCE))

    def _check_all(self, session: Session) -> None:
        """Check all ranks, on rank 0: for those that have left, and for heartbeats that stay the same."""
        others = range(1, self._world_size)
        for rank, heartbeat in zip(others, session.heartbeats.read_all(others), strict=True):
            if heartbeat is not None and heartbeat.end not in ("", "well"):
                self._left.setdefault(rank, time.monotonic())
            self._note_silence(rank, heartbeat, FULL_CHECK_S)
