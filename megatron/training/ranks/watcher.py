"""When one rank fails, ends early or never starts, all ranks end, and one of them reports why.

Two threads run beside the program. The store's thread (``store_thread.py``) has the connection to the store
of the rendezvous: it renews the heartbeat of this rank, joins the rendezvous, and looks for failures that
other ranks have written there. A store whose process is stopped never replies, and torch then waits without a
limit. The watcher's own thread therefore sends no requests: it looks at the processes of this machine and at
how long the store's thread has been waiting, and ends the process where the store cannot help.
"""

import os
import threading
import time
from collections.abc import Callable

from torch.distributed import Store

from megatron.training.ranks import stack_location
from megatron.training.ranks.failure import (
    CONSEQUENCE,
    GRACE_S,
    HOLD_S,
    STOP,
    Failure,
    FirstOnHost,
    end_process,
    print_line,
)
from megatron.training.ranks.heartbeat import own_location
from megatron.training.ranks.report import describe_rank
from megatron.training.ranks.store import StoreAddress
from megatron.training.ranks.store_thread import StoreThread

# Time between two polls of the watcher, and between two of the location of the main thread.
POLL_INTERVAL_S, LOCATION_INTERVAL_S = 0.25, 1.0
# Time until missing ranks are named, and until a rank is named that lets others wait in a long phase.
NOTICE_S, LONG_PHASE_S = 10.0, 30.0
# Longest time between a failure and the end of the process.
MAX_END_S = 60.0
# Longest wait of rank 0 for the others at the end of a run.
END_S = 5.0
DEFAULT_TIME_LIMIT_S = 600.0


class FailureWatcher:
    """Watches the other ranks from the moment it is made.

    Args:
        rank: of this process.
        world_size: number of ranks, more than one.
        address: of the store.
        print_report: prints why the run ends; its second argument is True if the cause lies in this rank.

    Attributes:
        time_limit_s: how long a heartbeat may stay the same before its rank counts as lost.
        stalls_count: whether a main thread that stays at one line for so long counts as waiting for lost
            ranks: collectives of some devices raise no error when a rank is lost.
    """

    def __init__(
        self, rank: int, world_size: int, address: StoreAddress, print_report: Callable[[str, bool], None]
    ):
        self._rank, self._world_size, self._address, self._print_report = (
            rank,
            world_size,
            address,
            print_report,
        )
        self.time_limit_s, self.stalls_count = DEFAULT_TIME_LIMIT_S, False
        self._over, self._lock = threading.Event(), threading.Lock()
        self._failure: Failure | None = None
        self._first_on_host = FirstOnHost(f"{address} {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")
        self._store_thread = StoreThread(self, rank, world_size, address)
        self._thread = threading.Thread(target=self._poll, name="failure-watcher", daemon=True)
        self._gone: set[int] = set()
        self._store_thread.start()
        self._thread.start()

    @property
    def failure(self) -> Failure | None:
        """The failure that this rank knows of, None while there is none."""
        return self._failure

    def rendezvous(self, limit_s: float, arguments: dict[str, str]) -> Store:
        """Wait until all ranks have called this.

        Args:
            limit_s: longest wait.
            arguments: what must be equal on all ranks, by name.

        Returns:
            A store of this attempt alone, for process groups.
        """
        self._store_thread.begin_rendezvous(arguments)
        began = time.monotonic()
        noticed = False
        while not self._store_thread.all_joined.wait(0.05):
            waited = time.monotonic() - began
            if waited > NOTICE_S and not noticed:
                noticed = True
                self._notice(limit_s)
            if waited > limit_s:
                self.fail(Failure(1, lambda: self._rendezvous_problem(limit_s), grace_s=0.0))
            if self._failure is not None:
                self.fail(self._failure)
        return self._store_thread.new_store()

    def _notice(self, limit_s: float) -> None:
        """Print once which ranks are missing."""
        ending = f"; the run ends after {limit_s:g} s of waiting (--rendezvous-timeout)"
        if self._store_thread.connected:
            self._store_thread.request_notice(ending)
        elif self._first_on_host.claim():
            print_line(f"[rank {self._rank}] {self._store_thread.problem}{ending}")

    def _rendezvous_problem(self, limit_s: float) -> str:
        remedy = "See what those ranks have printed; --rendezvous-timeout SECONDS sets how long to wait."
        if not self._store_thread.connected:
            return (
                f"{self._store_thread.problem}, for {limit_s:g} s. Start rank 0, and give all ranks the same "
                "MASTER_ADDR and MASTER_PORT; --rendezvous-timeout SECONDS sets how long to wait."
            )
        return f"after {limit_s:g} s still waiting for {self._store_thread.missing_ranks()}. {remedy}"

    def stop(self, status: int = 0) -> None:
        """End watching when this rank's run ends; a rank 0 that keeps the store waits a little for others.

        Args:
            status: exit status of the process.
        """
        if self._over.is_set():
            return
        self._over.set()
        self._store_thread.stop("well" if status == 0 else f"exit status {status}")
        # A thread that is inside torch when the interpreter ends would take the process down with a signal.
        self._store_thread.join(END_S + 1)
        self._thread.join(2 * POLL_INTERVAL_S)

    def note_failure(self, failure: Failure) -> None:
        """Note a failure, unless a more specific one is known; the threads then end the process."""
        with self._lock:
            known = self._failure
            if known is not None and known.kind == failure.kind == CONSEQUENCE and known.location is None:
                known = None  # the main thread has returned from the communication that failed
            if known is None or failure.kind < known.kind:
                self._failure = failure
        self._store_thread.wake()

    def fail(self, failure: Failure) -> None:
        """End all ranks, and report why if this rank is chosen to. Does not return."""
        self.note_failure(failure)
        time.sleep(MAX_END_S)
        self.end_without_agreement()

    def stop_all(self, status: int, line: Callable[[], str], grace_s: float, within_s: float) -> None:
        """End all ranks after a signal, which may have reached only this one. Returns only if that fails.

        Args:
            status: exit status for all.
            line: makes the report, if this rank is chosen to give it.
            grace_s: how long to wait for a rank 0 that has not started yet.
            within_s: how long all of it may take.
        """
        self._check_local_ranks()  # a launcher may have sent the signal because one of them ended
        self.note_failure(Failure(status, line, STOP, grace_s=grace_s))
        time.sleep(within_s)

    def reports_first(self) -> bool:
        """Whether this process is the first of its machine to report without asking the other ranks."""
        return self._first_on_host.claim()

    def report(self) -> None:
        """Print the failure of this rank, or what the heartbeats of all ranks show."""
        failure = self._failure
        if failure is not None and failure.text is not None:
            self._print_report(failure.text(), failure.kind != CONSEQUENCE)
        else:
            self._print_report(self._store_thread.explain(failure.error if failure else ""), False)

    def end_without_agreement(self) -> None:
        """End the process where the ranks cannot agree on a reporter: the first on this machine reports."""
        failure = self._failure
        if self._first_on_host.claim():
            if failure is not None and failure.text is not None:
                self._print_report(failure.text(), failure.kind != CONSEQUENCE)
            else:
                self._print_report(self._without_store(failure.error if failure else ""), False)
        # Others reach this a little later; and launchers end all processes when one is gone.
        time.sleep(HOLD_S)
        end_process(failure.status if failure else 1)

    def _without_store(self, error: str) -> str:
        """What the processes of this machine show."""
        known = self._store_thread.local_ranks
        conditions = {rank: heartbeat.process.condition() for rank, heartbeat in known.items()}
        ended = [rank for rank in known if conditions[rank] == "ended" and not known[rank].end]
        stopped = [rank for rank in known if conditions[rank] == "stopped"]
        findings = [
            f"{describe_rank(r, known[r])} has ended without a word, last seen in {known[r].location}"
            for r in ended
        ]
        findings += [f"{describe_rank(r, known[r])} is stopped by a signal (SIGSTOP)" for r in stopped]
        findings.append(self._store_thread.lost or self._address.silence())
        own = own_location(self._failure, detail=True)
        return f"{'; '.join(findings)}. Meanwhile rank {self._rank} is in {own}" + (
            f" ({error})" if error else ""
        )

    def _poll(self) -> None:
        """Body of the watcher's thread, which sends no requests to the store."""
        phases, polls = _LongPhases(self._rank), 0
        while not self._over.wait(POLL_INTERVAL_S):
            self._check_local_ranks()
            polls += 1
            if polls * POLL_INTERVAL_S % LOCATION_INTERVAL_S == 0:
                phases.update(own_location(self._failure))
            if self.stalls_count and phases.still_s > 0.9 * self.time_limit_s:
                self.note_failure(Failure(1, None, CONSEQUENCE, error="no progress within the time limit"))
            self._check_store()

    def _check_local_ranks(self) -> None:
        for rank, heartbeat in list(self._store_thread.local_ranks.items()):
            if rank not in self._gone and heartbeat.process.condition() == "ended":
                self._gone.add(rank)
                self._store_thread.check_rank(rank)

    def _check_store(self) -> None:
        """End the process where the store does not help: it does not reply, is gone, or was never there."""
        store_thread = self._store_thread
        silent_s = store_thread.silent_polls() * POLL_INTERVAL_S
        waiting = self._failure is not None or bool(store_thread.to_check)
        if store_thread.lost and store_thread.rank_0_died():
            self.note_failure(Failure(1, None, CONSEQUENCE))
            waiting = True
        failed_s = time.monotonic() - self._failure.at if self._failure is not None else 0.0
        unopened = not store_thread.connected and self._failure is not None
        grace_s = GRACE_S if self._failure is None else self._failure.grace_s
        if (waiting and (store_thread.lost or silent_s > GRACE_S)) or (unopened and failed_s > grace_s):
            self.end_without_agreement()
        if silent_s > self.time_limit_s:
            self.note_failure(Failure(1, None, CONSEQUENCE))


class _LongPhases:
    """Prints that a rank is in a long phase while others wait, and counts how long it stays at one line."""

    def __init__(self, rank: int):
        self._rank, self._next_s = rank, LONG_PHASE_S
        self._location: stack_location.StackLocation | None = None
        self._phase_polls = self._line_polls = 0

    @property
    def still_s(self) -> float:
        """How long the main thread has been at one line of a step."""
        in_step = self._location is not None and self._location.phase.startswith(
            ("iteration", "an evaluation")
        )
        return self._line_polls * LOCATION_INTERVAL_S if in_step else 0.0

    def update(self, location: stack_location.StackLocation) -> None:
        """Take the location of the main thread, once every ``LOCATION_INTERVAL_S``.

        Counting calls and not seconds leaves out the time in which the whole job is stopped.
        """
        before, self._location = self._location, location
        self._line_polls = self._line_polls + 1 if location == before else 0
        if before is None or before.phase != location.phase:
            self._phase_polls, self._next_s = 0, LONG_PHASE_S
            return
        self._phase_polls += 1
        if (
            location.phase in stack_location.LONG_PHASES
            and not location.waits
            and self._phase_polls * LOCATION_INTERVAL_S >= self._next_s
        ):
            print_line(
                f"rank {self._rank} has been {location.phase} for {self._next_s:g} s; other ranks wait for it"
            )
            self._next_s *= 2
