"""The thread that owns a rank's connection to the store of the rendezvous."""

import os
import threading
import time
from collections.abc import Iterable
from typing import Protocol

from torch.distributed import PrefixStore, Store

from megatron.training.ranks import ending
from megatron.training.ranks.beats import Beat
from megatron.training.ranks.failure import CONSEQUENCE, Failure, end_process
from megatron.training.ranks.meeting import Meeting, absent
from megatron.training.ranks.sentences import one_rank
from megatron.training.ranks.session import Session
from megatron.training.ranks.store import Address, Canary, NoStore, WatchedStore, connect, first_line

END_S = 5.0
# Rank 0 looks for ranks that give no sign, and a rank that left is given time for the others to leave too.
ROUND_S = 5.0
# Up to this many ranks, all are read to find those of this machine.
_SMALL_WORLD = 64


class Owner(Protocol):
    """What the thread needs of its owner."""

    time_limit_s: float

    @property
    def failure(self) -> Failure | None: ...

    def propose(self, failure: Failure) -> None: ...

    def say_why(self) -> None: ...


class Keeper:
    """Owner of the connection.

    Args:
        owner: is told what this thread finds.
        rank: of this process.
        world_size: number of ranks.
        address: of the store.

    Attributes:
        met: set when all ranks are there.
        neighbours: last records of other ranks on this machine.
        asked: ranks whose process has ended, about which the store has not yet been asked.
        problem: why there is no connection.
        lost: why there is no connection any more; "" while there is.
    """

    def __init__(self, owner: Owner, rank: int, world_size: int, address: Address):
        self._owner, self._rank, self._world_size, self._address = owner, rank, world_size, address
        self.met = threading.Event()
        self.neighbours: dict[int, Beat] = {}
        self.asked: list[int] = []
        self.problem, self.lost = "the store of the job has not been reached", ""
        self._over, self._wake, self._end = threading.Event(), threading.Event(), ""
        self._store: WatchedStore | None = None
        self._session: Session | None = None
        self._arguments: dict[str, str] | None = None
        self._meeting: Meeting | None = None
        self._notice = ""
        self._rank_0: Beat | None = None
        self._silence: dict[int, tuple[Beat, float]] = {}
        self._left: dict[int, float] = {}
        self._round_at = self._renewed_at = 0.0
        self._thread = threading.Thread(target=self._serve, name="rank-store", daemon=True)

    # What the owner calls, from other threads.

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, end: str) -> None:
        """End the thread; the record of this rank says how the run ended."""
        self._end = end
        self._over.set()
        self._wake.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread."""
        self._thread.join(timeout_s)

    def wake(self) -> None:
        """Look at once."""
        self._wake.set()

    @property
    def connected(self) -> bool:
        """Whether there is, or was, a connection."""
        return self._session is not None

    def begin_meeting(self, arguments: dict[str, str]) -> None:
        """Wait for the others; sets ``met``."""
        self._arguments = arguments
        self._wake.set()

    def request_notice(self, text: str) -> None:
        """Let one rank say who is waited for, with ``text`` behind it."""
        self._notice = text
        self._wake.set()

    def ask_about(self, rank: int) -> None:
        """A process of this machine has ended: find out whether its run has."""
        self.asked.append(rank)
        self._wake.set()

    def silent_looks(self) -> int:
        """How many times in a row this was called while the store did not answer one question."""
        return 0 if self._store is None else self._store.silent_looks()

    def rank_0_ended_silently(self) -> bool:
        """Whether rank 0 kept the store and is gone without having ended its run."""
        beat = self._rank_0
        return not self._address.by_launcher and self._rank != 0 and beat is not None and not beat.end

    def new_store(self) -> Store:
        """A connection for process groups, which wait in it, with keys of this attempt alone."""
        store = connect(self._address, self._over, lambda _: None)
        return PrefixStore(f"attempt_{self._session.attempt}", store)

    def absent(self) -> str:
        """Who has not come to the meeting."""
        if threading.current_thread() is not self._thread:
            return f"other ranks: {self._address.silence()}"
        return absent(self._session)

    def explain(self, error: str) -> str:
        """What the records of all ranks tell; in this thread only."""
        return ending.explanation(self._session, error)

    # The thread.

    def _serve(self) -> None:
        while not self._over.is_set() and not self.lost:
            try:
                self._serve_one_store()
            except NoStore as error:
                self.problem = str(error)
                self._owner.propose(Failure(1, lambda: self.problem, patience_s=0.0))
                return
            except RuntimeError as error:
                reason = (
                    f"the store of the job at {self._address}, which {self._address.keeper} kept, is gone"
                )
                if self._session is None or self._session.attempt or self._owner.failure is not None:
                    self.lost = f"{reason} ({first_line(error)})"
                else:  # that of an attempt that ended as this process came: there may be another
                    self.problem, self._session, self._meeting, self._rank_0 = reason, None, None, None

    def _serve_one_store(self) -> None:
        store = connect(self._address, self._over, self._note_problem)
        if store is None:
            return
        self._store = WatchedStore(store, Canary(self._address, self._world_size))
        place = (self._rank, self._world_size, self._address)
        self._session = Session(self._store, *place, lambda: self._owner.failure)
        while not self._over.is_set():
            self._step(self._session)
            self._wake.wait(self._session.interval_s)
            self._wake.clear()
        self._end_well(self._session)

    def _note_problem(self, text: str) -> None:
        self.problem = text

    def _step(self, session: Session) -> None:
        """One sign of life, and one look at the other ranks."""
        other = session.beat()
        if other is not None:
            self._refuse_double(session, other)
        if self._rank != 0:
            self._look_at_rank_0(session)
        if self._arguments is not None and not session.met:
            self._go_on_meeting(session, self._arguments)
        self._learn_neighbours(session)
        self._judge_ended(session)
        if self._rank == 0 and session.met and time.monotonic() - self._round_at > ROUND_S:
            self._round_at = time.monotonic()
            self._look_at_all(session)
        failure = self._owner.failure
        alone = failure is not None and time.monotonic() - failure.at > failure.patience_s
        if ending.failed(session) or alone or (failure is not None and session.attempt):
            self._end_all(session)

    def _end_all(self, session: Session) -> None:
        status, speaks = ending.settle(session, self._owner.failure)
        if speaks:
            self._owner.say_why()
            ending.spoken(session)
        ending.leave_last(session)
        end_process(status)

    def _end_well(self, session: Session) -> None:
        session.beat(end=self._end)
        if not session.attempt:
            return
        shared, deadline = session.shared(), time.monotonic() + END_S
        ended = shared.add("ended", 1)
        while self._address.hosted_here and ended < self._world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            ended = shared.add("ended", 0)

    def _refuse_double(self, session: Session, other: Beat) -> None:
        both = sorted(f"process {p.pid} on {p.host}" for p in (session.own.process, other.process))
        text = f"RANK={self._rank} was given to two processes: {' and '.join(both)}. Start each rank once"
        self._owner.propose(Failure(1, lambda: text))

    def _go_on_meeting(self, session: Session, arguments: dict[str, str]) -> None:
        self._meeting = self._meeting or Meeting(session, arguments)
        problem = self._meeting.go_on()
        if problem:
            self._owner.propose(Failure(1, lambda: problem))
        if session.met:
            self.met.set()
        elif self._notice:
            self._meeting.notice(self._notice)
        self._notice = ""

    # Other ranks.

    def _look_at_rank_0(self, session: Session) -> None:
        """Learn the name of the attempt from a rank 0 that lives."""
        before, beat = self._rank_0, session.beats.read(0)
        self._rank_0 = beat
        if beat is not None and 0 in self.neighbours and self.neighbours[0].nonce == beat.nonce:
            self.neighbours[0] = beat
        self._note_silence(0, beat, session.interval_s)
        lives = beat is not None and before is not None and beat.nonce == before.nonce
        if not lives or beat.number == before.number or session.attempt == beat.nonce:
            return
        if session.met:
            text = f"{one_rank(0, beat)} has been started again during the run"
            self._owner.propose(Failure(1, lambda: text))
            return
        session.attempt = beat.nonce
        if beat.world_size != self._world_size:
            text = (
                f"{one_rank(self._rank, session.own)} was started with WORLD_SIZE={self._world_size}, but "
                f"{one_rank(0, beat)} with WORLD_SIZE={beat.world_size}: give all ranks the same number"
            )
            self._owner.propose(Failure(1, lambda: text))

    def _note_silence(self, rank: int, beat: Beat | None, passed_s: float) -> None:
        """Add up how long a rank gives no sign of life; not counting time in which this one stood still."""
        if beat is None or beat.end:
            return
        known, silent_s = self._silence.get(rank, (None, 0.0))
        same = known is not None and (known.nonce, known.number) == (beat.nonce, beat.number)
        silent_s = silent_s + passed_s if same else 0.0
        self._silence[rank] = (beat, silent_s)
        if self.met.is_set() and silent_s > self._owner.time_limit_s:
            self._owner.propose(Failure(1, None, CONSEQUENCE))

    def _learn_neighbours(self, session: Session) -> None:
        """Read the records of ranks that may be on this machine until each has joined, and then sometimes."""
        unknown = [rank for rank in self._near() if rank not in self.neighbours]
        if session.met and time.monotonic() - self._renewed_at > ROUND_S:
            self._renewed_at = time.monotonic()
            unknown = list(self._near())
        if not unknown or not session.attempt:
            return
        for rank, beat in zip(unknown, session.beats.read_all(unknown), strict=True):
            if beat is not None and session.attempt in (beat.joined, beat.nonce):
                self.neighbours[rank] = beat

    def _near(self) -> Iterable[int]:
        first, last = 0, self._world_size
        if self._world_size > _SMALL_WORLD:
            local, size = (os.environ.get(name, "") for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
            if not (local.isdigit() and size.isdigit()):
                return ()
            first = max(self._rank - int(local), 0)
            last = min(first + int(size), self._world_size)
        return (rank for rank in range(first, last) if rank != self._rank)

    def _judge_ended(self, session: Session) -> None:
        """A process has ended: its record tells whether its run had."""
        for rank in list(self.asked):
            beat, known = session.beats.read(rank), self.neighbours[rank]
            if beat is None or (beat.nonce == known.nonce and not beat.end):
                self._owner.propose(Failure(1, None, CONSEQUENCE))
            elif beat.end != "well":
                self._left.setdefault(rank, time.monotonic())
            self.asked.remove(rank)
        if any(time.monotonic() - since > ROUND_S for since in self._left.values()):
            self._owner.propose(Failure(1, None, CONSEQUENCE))

    def _look_at_all(self, session: Session) -> None:
        """Rank 0 looks for ranks that have left, and for those that give no sign."""
        others = range(1, self._world_size)
        for rank, beat in zip(others, session.beats.read_all(others), strict=True):
            if beat is not None and beat.end not in ("", "well"):
                self._left.setdefault(rank, time.monotonic())
            self._note_silence(rank, beat, ROUND_S)
