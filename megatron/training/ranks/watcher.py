"""When one rank fails, ends or does not come, all end, and one of them says why.

Two threads watch beside the program. One owns a connection to the store of the rendezvous: it renews the
record of this rank, helps the ranks to meet, and looks for failures that others have written there. A store
whose process is stopped answers no more and torch then waits without end; so the other thread asks nobody. It
looks at the processes of this machine and at how long the first thread has been waiting, and ends the process
where the store cannot.
"""

import os
import threading
import time
from collections.abc import Callable

from torch.distributed import Store

from megatron.training.ranks import places
from megatron.training.ranks.failure import CONSEQUENCE, HOLD_S, PATIENCE_S, STOP, Failure, end_process, say
from megatron.training.ranks.keeper import Keeper
from megatron.training.ranks.processes import FirstOnHost
from megatron.training.ranks.sentences import one_rank
from megatron.training.ranks.session import own_place
from megatron.training.ranks.store import Address

LOOK_S, PLACE_S = 0.25, 1.0
# First word about ranks that have not come, and about a rank that lets others wait in a long phase.
NOTICE_S, LONG_PHASE_S = 10.0, 30.0
# Longest time between a failure and the end of the process.
LAST_WORD_S = 60.0
# Longest wait of rank 0 for the others at the end of a run.
END_S = 5.0
DEFAULT_TIME_LIMIT_S = 600.0


class FailureWatcher:
    """Watches the other ranks from the moment it is made.

    Args:
        rank: of this process.
        world_size: number of ranks, more than one.
        address: of the store.
        tell: prints why the run ends; its second argument is True where that lies in this rank.

    Attributes:
        time_limit_s: after which a rank that gives no sign is taken for lost.
        stalls_count: whether a main thread that stays at one line for so long is taken for waiting, because
            its device's collectives raise nothing in it.
    """

    def __init__(self, rank: int, world_size: int, address: Address, tell: Callable[[str, bool], None]):
        self._rank, self._world_size, self._address, self._tell = rank, world_size, address, tell
        self.time_limit_s, self.stalls_count = DEFAULT_TIME_LIMIT_S, False
        self._over, self._lock = threading.Event(), threading.Lock()
        self._failure: Failure | None = None
        self._first_on_host = FirstOnHost(f"{address} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")
        self._keeper = Keeper(self, rank, world_size, address)
        self._thread = threading.Thread(target=self._look_around, name="failure-watcher", daemon=True)
        self._gone: set[int] = set()
        self._keeper.start()
        self._thread.start()

    @property
    def failure(self) -> Failure | None:
        """What has gone wrong here, None while nothing has."""
        return self._failure

    def meet(self, limit_s: float, arguments: dict[str, str]) -> Store:
        """Wait until all ranks have called this.

        Args:
            limit_s: longest wait.
            arguments: what must be equal on all ranks, by name.

        Returns:
            A store of this attempt alone, for process groups.
        """
        self._keeper.begin_meeting(arguments)
        began = time.monotonic()
        noticed = False
        while not self._keeper.met.wait(0.05):
            waited = time.monotonic() - began
            if waited > NOTICE_S and not noticed:
                noticed = True
                self._notice(limit_s)
            if waited > limit_s:
                self.fail(Failure(1, lambda: self._no_meeting(limit_s), patience_s=0.0))
            if self._failure is not None:
                self.fail(self._failure)
        return self._keeper.new_store()

    def _notice(self, limit_s: float) -> None:
        """Say once who is waited for."""
        ending = f"; the run ends after {limit_s:g} s of waiting (--rendezvous-timeout)"
        if self._keeper.connected:
            self._keeper.request_notice(ending)
        elif self._first_on_host.claim():
            say(f"[rank {self._rank}] {self._keeper.problem}{ending}")

    def _no_meeting(self, limit_s: float) -> str:
        remedy = "See what those ranks have printed; --rendezvous-timeout SECONDS sets how long to wait."
        if not self._keeper.connected:
            return (
                f"{self._keeper.problem}, for {limit_s:g} s. Start rank 0, and give all ranks the same "
                "MASTER_ADDR and MASTER_PORT; --rendezvous-timeout SECONDS sets how long to wait."
            )
        return f"after {limit_s:g} s still waiting for {self._keeper.absent()}. {remedy}"

    def stop(self, status: int = 0) -> None:
        """This rank has ended its run; rank 0, if it keeps the store, waits a little for the others.

        Args:
            status: exit status of the process.
        """
        if self._over.is_set():
            return
        self._over.set()
        self._keeper.stop("well" if status == 0 else f"exit status {status}")
        # A thread that is inside torch when the interpreter ends would take the process down with a signal.
        self._keeper.join(END_S + 1)
        self._thread.join(2 * LOOK_S)

    def propose(self, failure: Failure) -> None:
        """Note a failure, unless one is known that says more; the threads then end the process."""
        with self._lock:
            known = self._failure
            if known is not None and known.kind == failure.kind == CONSEQUENCE and known.place is None:
                known = None  # the main thread has come back from the message that failed
            if known is None or failure.kind < known.kind:
                self._failure = failure
        self._keeper.wake()

    def fail(self, failure: Failure) -> None:
        """End all ranks, and say why if it is for this one to say. Does not return."""
        self.propose(failure)
        time.sleep(LAST_WORD_S)
        self.end_alone()

    def stop_all(self, status: int, line: Callable[[], str], patience_s: float, within_s: float) -> None:
        """End all ranks after a signal, which may have reached only this one. Returns only if that fails.

        Args:
            status: exit status for all.
            line: what to say, if this is the rank that does.
            patience_s: how long to wait for ranks that have not come yet.
            within_s: how long all of it may take.
        """
        self._look_at_neighbours()  # a launcher may have sent the signal because one of them ended
        self.propose(Failure(status, line, STOP, patience_s=patience_s))
        time.sleep(within_s)

    def speaks_first(self) -> bool:
        """Whether this process is the first of this machine to say that it leaves without asking others."""
        return self._first_on_host.claim()

    def say_why(self) -> None:
        """Print the failure of this rank, or what the records of all tell."""
        failure = self._failure
        if failure is not None and failure.text is not None:
            self._tell(failure.text(), failure.kind != CONSEQUENCE)
        else:
            self._tell(self._keeper.explain(failure.error if failure else ""), False)

    def end_alone(self) -> None:
        """End where the ranks cannot agree who speaks: the first on this machine does."""
        failure = self._failure
        if self._first_on_host.claim():
            if failure is not None and failure.text is not None:
                self._tell(failure.text(), failure.kind != CONSEQUENCE)
            else:
                self._tell(self._without_store(failure.error if failure else ""), False)
        # The others come to speak a little later; and launchers end all when one is gone.
        time.sleep(HOLD_S)
        end_process(failure.status if failure else 1)

    def _without_store(self, error: str) -> str:
        """What can be known without the store."""
        known = self._keeper.neighbours
        conditions = {rank: beat.process.condition() for rank, beat in known.items()}
        ended = [rank for rank in known if conditions[rank] == "ended" and not known[rank].end]
        stopped = [rank for rank in known if conditions[rank] == "stopped"]
        told = [
            f"{one_rank(r, known[r])} has ended without a word, last seen in {known[r].place}" for r in ended
        ]
        told += [f"{one_rank(r, known[r])} is stopped by a signal (SIGSTOP)" for r in stopped]
        told.append(self._keeper.lost or self._address.silence())
        own = own_place(self._failure, detail=True)
        return f"{'; '.join(told)}. Meanwhile rank {self._rank} is in {own}" + (
            f" ({error})" if error else ""
        )

    def _look_around(self) -> None:
        """Body of the thread that asks nobody."""
        phases, looks = _LongPhases(self._rank), 0
        while not self._over.wait(LOOK_S):
            self._look_at_neighbours()
            looks += 1
            if looks * LOOK_S % PLACE_S == 0:
                phases.look(own_place(self._failure))
            if self.stalls_count and phases.still_s > 0.9 * self.time_limit_s:
                self.propose(Failure(1, None, CONSEQUENCE, error="no progress within the time limit"))
            self._look_at_store()

    def _look_at_neighbours(self) -> None:
        for rank, beat in list(self._keeper.neighbours.items()):
            if rank not in self._gone and beat.process.condition() == "ended":
                self._gone.add(rank)
                self._keeper.ask_about(rank)

    def _look_at_store(self) -> None:
        """End the process where the store does not help: it is silent or gone, or nobody has opened it."""
        keeper = self._keeper
        silent_s = keeper.silent_looks() * LOOK_S
        waiting = self._failure is not None or bool(keeper.asked)
        if keeper.lost and keeper.rank_0_ended_silently():
            self.propose(Failure(1, None, CONSEQUENCE))
            waiting = True
        failed_s = time.monotonic() - self._failure.at if self._failure is not None else 0.0
        unopened = not keeper.connected and self._failure is not None
        patience_s = PATIENCE_S if self._failure is None else self._failure.patience_s
        if (waiting and (keeper.lost or silent_s > PATIENCE_S)) or (unopened and failed_s > patience_s):
            self.end_alone()
        if silent_s > self.time_limit_s:
            self.propose(Failure(1, None, CONSEQUENCE))


class _LongPhases:
    """Says that a rank is at something long while others wait, and counts how long it is at one line."""

    def __init__(self, rank: int):
        self._rank, self._next_s = rank, LONG_PHASE_S
        self._place: places.Place | None = None
        self._phase_looks = self._line_looks = 0

    @property
    def still_s(self) -> float:
        """How long the main thread has been at one line of a step."""
        in_step = self._place is not None and self._place.phase.startswith(("iteration", "an evaluation"))
        return self._line_looks * PLACE_S if in_step else 0.0

    def look(self, place: places.Place) -> None:
        """Called every PLACE_S; counting looks leaves out the time in which the whole job is stopped."""
        before, self._place = self._place, place
        self._line_looks = self._line_looks + 1 if place == before else 0
        if before is None or before.phase != place.phase:
            self._phase_looks, self._next_s = 0, LONG_PHASE_S
            return
        self._phase_looks += 1
        if (
            place.phase in places.LONG_PHASES
            and not place.waits
            and self._phase_looks * PLACE_S >= self._next_s
        ):
            say(f"rank {self._rank} has been {place.phase} for {self._next_s:g} s; other ranks wait for it")
            self._next_s *= 2
