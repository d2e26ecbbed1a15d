"""The store through which the ranks of a job find each other: its address, and connections to it."""

import contextlib
import os
import re
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore

PROBE_S = 5.0
RETRY_S = 0.2
# Torch's limit for requests that wait for a key; none here does.
OPERATION_S = 60.0
# Longest wait for the first reply; what listens at the port without replying is not the store.
FIRST_REPLY_S = 10.0
# In larger jobs no probes are made, to spare the process that keeps the store their connections.
MAX_PROBES = 256


class StoreUnavailable(Exception):
    """The store cannot be reached, and trying again will not help."""


@dataclass(frozen=True)
class StoreAddress:
    """Address of the store.

    Attributes:
        host, port: MASTER_ADDR and MASTER_PORT.
        hosted_here: this process keeps it.
        by_launcher: torchrun keeps it.
        ends_with_this_rank: it ends when this process does: this process keeps it, or torchrun on this host
            does, which ends with its ranks, and other hosts have ranks that need it.
    """

    host: str
    port: int
    hosted_here: bool
    by_launcher: bool
    ends_with_this_rank: bool = False

    @classmethod
    def of_environment(cls, rank: int) -> "StoreAddress | None":
        """The address in the environment; None where it holds none that can be used."""
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            return None
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        hosted_here = rank == 0 and not by_launcher
        # The torchrun that started the first group of ranks keeps it.
        of_first_host = by_launcher and os.environ.get("GROUP_RANK") == "0"
        has_other_hosts = os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE")
        ends = hosted_here or (of_first_host and has_other_hosts)
        return cls(host, int(port), hosted_here, by_launcher, ends)

    @property
    def keeper(self) -> str:
        """Who keeps the store."""
        return "torchrun on the first host" if self.by_launcher else "rank 0"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def silence(self) -> str:
        """Sentence that the store does not answer."""
        return f"the store of the job at {self} does not answer, which is kept by {self.keeper}"


def connect(address: StoreAddress, over: threading.Event, problem: Callable[[str], None]) -> TCPStore | None:
    """Connect to the store, as soon as there is one at the address; None when ``over`` is set before.

    Args:
        over: ends the attempts.
        problem: called after each failed attempt with the reason.

    Raises:
        StoreUnavailable: this process is to keep the store and cannot.
    """
    while not over.is_set():
        reason = None if address.hosted_here else _why_not(address)
        if reason is None:
            store, reason = _open(address)
            if store is not None:
                return store
        if address.hosted_here:
            raise StoreUnavailable(reason)
        problem(
            f"{reason} at {address} (MASTER_ADDR:MASTER_PORT), where {address.keeper} has the store through "
            "which ranks meet"
        )
        over.wait(RETRY_S)
    return None


def _why_not(address: StoreAddress) -> str | None:
    """The reason why no connection can be made; None where one can."""
    try:
        with socket.create_connection((address.host, address.port), timeout=PROBE_S):
            return None
    except socket.gaierror as error:
        return f"no machine is known under that name ({error.strerror or error})"
    except TimeoutError:
        return "nothing answers"
    except OSError as error:
        return f"nobody listens ({(error.strerror or str(error)).lower()})"


def _open(address: StoreAddress) -> tuple[TCPStore | None, str]:
    """(connection, "") or (None, reason); in a thread, as torch waits for the first reply without a limit."""
    result: list[TCPStore | Exception] = []

    def attempt() -> None:
        try:
            result.append(
                TCPStore(
                    address.host,
                    address.port,
                    None,
                    is_master=address.hosted_here,
                    timeout=timedelta(seconds=OPERATION_S),
                    wait_for_workers=False,
                    multi_tenant=True,  # several connections of this process share the port
                )
            )
        except (RuntimeError, ValueError) as error:
            result.append(error)

    thread = threading.Thread(target=attempt, name="store-connection", daemon=True)
    thread.start()
    deadline = time.monotonic() + FIRST_REPLY_S
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.05)
    if not result:
        return None, "something listens that is not the store of this job, or its process is stopped,"
    if isinstance(result[0], TCPStore):
        return result[0], ""
    return None, _reason(address, result[0])


def _reason(address: StoreAddress, error: Exception) -> str:
    text = first_line(error)
    if address.hosted_here and "EADDRINUSE" in str(error):
        return (
            f"MASTER_PORT={address.port}: another process of this machine listens at that port, so rank 0 "
            "cannot keep the store there. Give all ranks another port, unless two processes have RANK=0"
        )
    return f"no store can be opened ({text})"


class ConnectionProbe:
    """An idle connection, which closes when the process that keeps the store ends.

    Torch prints its own stack frames when a request finds the store gone, so this is checked before each one.
    """

    def __init__(self, address: StoreAddress, world_size: int):
        self._socket: socket.socket | None = None
        if world_size <= MAX_PROBES:
            with contextlib.suppress(OSError):
                self._socket = socket.create_connection((address.host, address.port), timeout=PROBE_S)

    def check(self) -> None:
        """Raises RuntimeError when the store is gone."""
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            raise RuntimeError("its process has ended")

    def close(self) -> None:
        """End the connection."""
        if self._socket is not None:
            self._socket.close()


class WatchedStore:
    """A store with a prefix for its keys, in which another thread can see how long a request has no reply.

    Args:
        store: to send requests to.
        probe: says whether the store still exists.
        prefix: of every key.
    """

    def __init__(self, store: Store, probe: ConnectionProbe, prefix: str = ""):
        self._store = PrefixStore(prefix, store) if prefix else store
        self._probe = probe
        self._requests = self._replies = self._polled = self._polls = 0
        self._prefixed: dict[str, WatchedStore] = {}

    def below(self, prefix: str) -> "WatchedStore":
        """The same store with a longer prefix; ``silent_polls`` of this object counts its requests, too."""
        if prefix not in self._prefixed:
            self._prefixed[prefix] = WatchedStore(self._store, self._probe, prefix)
        return self._prefixed[prefix]

    def silent_polls(self) -> int:
        """How many times in a row this was called while one and the same request had no reply."""
        waits = self._requests != self._replies
        self._polls = self._polls + 1 if waits and self._requests == self._polled else 0
        self._polled = self._requests
        return max([self._polls, *(store.silent_polls() for store in list(self._prefixed.values()))])

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)

        def request(*words: Any) -> Any:
            self._probe.check()
            self._requests += 1
            reply = operation(*words)
            self._replies = self._requests
            return reply

        return request


def first_line(error: BaseException) -> str:
    """Message of an error without the C++ stack frames that torch appends."""
    text = str(error).partition("\nException raised from")[0].strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return re.sub(r"^\[\S+:\d+\] ", "", first).partition(" This is typically")[0]
