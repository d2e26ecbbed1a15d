"""When one rank fails, all end, and the cause is printed once.

A rank that stops alone leaves the others waiting for it, up to the timeout of their collectives, and some
launchers do not notice. Every rank therefore keeps a connection to the store of the rendezvous and asks it,
in a thread, whether somebody has failed.

The failing rank writes its number there, waits a moment in case a lower one fails of the same cause, and the
lowest prints. Nobody leaves before that is done: a launcher ends all ranks as soon as one is gone.
"""

import os
import threading
import time
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

# A failure of all ranks, such as a wrong argument, reaches them within this time.
SETTLE_S = 1.0
# Longest wait for the printing rank, which may have died.
PRINT_S = 10.0
CONNECT_S = 60.0
# Longest wait of rank 0 for the others at the end of a run.
END_S = 5.0
# Questions per second that the store is to answer, at most.
_QUESTIONS_PER_S = 1000


class Lookout:
    """Watches the other ranks from the moment it is made.

    Args:
        rank: of this process.
        world_size: number of ranks, more than one.

    Attributes:
        interval_s: time between two looks.
    """

    def __init__(self, rank: int, world_size: int):
        self._rank, self._world_size = rank, world_size
        self.interval_s = max(0.5, world_size / _QUESTIONS_PER_S)
        self._store: PrefixStore | None = None
        self._connected, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lookout", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The run has ended well; the host of the store waits a little for the others to end too."""
        if self._over.is_set():
            return
        self._over.set()
        # A thread that is inside torch when the interpreter ends would take the process down with a signal.
        self._thread.join(END_S)
        if self._store is None:
            return
        deadline = time.monotonic() + END_S
        try:
            ended = self._store.add("ended", 1)
            while self._rank == 0 and ended < self._world_size and time.monotonic() < deadline:
                time.sleep(0.05)
                ended = self._store.add("ended", 0)
        except RuntimeError:  # the host did not wait any longer
            pass

    def report(self, status: int, patience_s: float = PRINT_S) -> bool:
        """Tell the others that this rank fails, and end them.

        Args:
            status: exit status for all of them.
            patience_s: how long to wait for a rendezvous that has not come about yet.

        Returns:
            True for the one rank that shall print what happened; it then calls :meth:`printed`.
        """
        self._over.set()
        if not self._connected.wait(patience_s) or self._store is None:
            return True
        try:
            self._claim(status)
            time.sleep(SETTLE_S)
            if self._lowest()[0] == self._rank and self._store.add("printing", 1) == 1:
                return True
            self._wait_until_printed()
            self._leave_last()
        except RuntimeError:  # the store is gone with its host: what happened there has been told
            pass
        return False

    def speaks_first(self) -> bool:
        """Whether this rank is the first of those that leave without waiting for the others."""
        if self._store is None or not self._connected.is_set():
            return True
        try:
            return self._store.add("printing", 1) == 1
        except RuntimeError:
            return True

    def printed(self) -> None:
        """The cause is on the screen: everybody may leave, the host of the store last."""
        if self._store is None:
            return
        try:
            self._store.set("printed", "1")
        except RuntimeError:
            return
        self._leave_last()

    def _leave_last(self) -> None:
        """Rank 0, which may host the store, gives the others time to read it."""
        if self._rank == 0:
            time.sleep(2 * self.interval_s + 0.5)

    def _claim(self, status: int) -> None:
        """Make this rank the lowest that failed, unless another is lower."""
        mine, known = f"{self._rank} {status}", ""
        while True:
            found = self._store.compare_set("lowest", known, mine).decode()
            if found == mine or (found and int(found.split()[0]) <= self._rank):
                return
            known = found

    def _lowest(self) -> tuple[int, int]:
        """(rank, exit status) of the lowest failed rank."""
        rank, status = self._store.get("lowest").decode().split()
        return int(rank), int(status)

    def _wait_until_printed(self) -> None:
        deadline = time.monotonic() + PRINT_S
        while not self._store.check(["printed"]) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _watch(self) -> None:
        """Body of the thread."""
        try:
            self._store = connect(self._rank, self._world_size, timedelta(seconds=CONNECT_S))
            self._connected.set()
            while not self._over.wait(self.interval_s):
                if not self._store.check(["lowest"]):
                    continue
                status = self._lowest()[1]
                self._wait_until_printed()
                self._leave_last()
                if not self._over.is_set():
                    # The main thread cannot be woken from a collective.
                    os._exit(status)
        except RuntimeError:
            # No rendezvous, which the main thread will report, or one that ended before this rank did.
            self._connected.set()


def connect(rank: int, world_size: int, timeout: timedelta) -> PrefixStore:
    """The store of this job's rendezvous, apart from the keys of others and of earlier attempts.

    Raises:
        RuntimeError: nobody answers at MASTER_ADDR and MASTER_PORT.
    """
    hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not hosted_by_launcher,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,  # torch's own rendezvous shares the port
    )
    return PrefixStore(f"lookout_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
