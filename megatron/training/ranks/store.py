"""The store through which the ranks of a job find each other: where it is, and why it cannot be reached."""

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
# Torch's own limit for what the store is to wait for; nothing here lets it wait.
OPERATION_S = 60.0
# What answers at the port, and says nothing, is not the store.
GREETING_S = 10.0
# Beyond so many ranks the process that keeps the store has enough connections.
CANARIES = 256


class NoStore(Exception):
    """The store cannot be reached, and trying again will not help."""


@dataclass(frozen=True)
class Address:
    """Where the store is.

    Attributes:
        host, port: MASTER_ADDR and MASTER_PORT.
        hosted_here: this process keeps it.
        by_launcher: torchrun keeps it.
    """

    host: str
    port: int
    hosted_here: bool
    by_launcher: bool

    @classmethod
    def of_environment(cls, rank: int) -> "Address | None":
        """The address in the environment; None where it holds none that can be used."""
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            return None
        by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(host, int(port), rank == 0 and not by_launcher, by_launcher)

    @property
    def keeper(self) -> str:
        """Who keeps the store."""
        return "torchrun on the first host" if self.by_launcher else "rank 0"

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def silence(self) -> str:
        """Says that the store has stopped answering."""
        return f"the store of the job at {self} does not answer, which is kept by {self.keeper}"


def connect(address: Address, over: threading.Event, problem: Callable[[str], None]) -> TCPStore | None:
    """A connection to the store, made as soon as somebody keeps one there; None when ``over`` is set before.

    Args:
        problem: is told, again and again, why there is no connection yet.

    Raises:
        NoStore: this process is to keep the store and cannot.
    """
    while not over.is_set():
        reason = None if address.hosted_here else _why_not(address)
        if reason is None:
            store, reason = _open(address)
            if store is not None:
                return store
        if address.hosted_here:
            raise NoStore(reason)
        problem(
            f"{reason} at {address} (MASTER_ADDR:MASTER_PORT), where {address.keeper} has the store through "
            "which ranks meet"
        )
        over.wait(RETRY_S)
    return None


def _why_not(address: Address) -> str | None:
    """Why no connection can be made, in words; None where one can."""
    try:
        with socket.create_connection((address.host, address.port), timeout=PROBE_S):
            return None
    except socket.gaierror as error:
        return f"no machine is known under that name ({error.strerror or error})"
    except TimeoutError:
        return "nothing answers"
    except OSError as error:
        return f"nobody listens ({(error.strerror or str(error)).lower()})"


def _open(address: Address) -> tuple[TCPStore | None, str]:
    """(connection, "") or (None, why not). Torch waits without end for a greeting, so it does in a thread."""
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
    deadline = time.monotonic() + GREETING_S
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.05)
    if not result:
        return None, "something listens that is not the store of this job, or its process is stopped,"
    if isinstance(result[0], TCPStore):
        return result[0], ""
    return None, _reason(address, result[0])


def _reason(address: Address, error: Exception) -> str:
    text = first_line(error)
    if address.hosted_here and "EADDRINUSE" in str(error):
        return (
            f"MASTER_PORT={address.port}: another process of this machine listens at that port, so rank 0 "
            "cannot keep the store there. Give all ranks another port, unless two processes have RANK=0"
        )
    return f"no store can be opened ({text})"


class Canary:
    """A connection on which nothing is said: it ends with the process that keeps the store.

    Torch prints its own frames when a question meets a store that is gone, so this is looked at before.
    """

    def __init__(self, address: Address, world_size: int):
        self._socket: socket.socket | None = None
        if world_size <= CANARIES:
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
    """A store that another thread can see waiting, with a prefix for its keys.

    Args:
        store: to ask.
        canary: says whether the store is there.
        prefix: before every key.
    """

    def __init__(self, store: Store, canary: Canary, prefix: str = ""):
        self._store = PrefixStore(prefix, store) if prefix else store
        self._canary = canary
        self._questions = self._answers = self._seen = self._looks = 0
        self._parts: dict[str, WatchedStore] = {}

    def part(self, prefix: str) -> "WatchedStore":
        """The same store, below a prefix; this object also sees its waiting."""
        if prefix not in self._parts:
            self._parts[prefix] = WatchedStore(self._store, self._canary, prefix)
        return self._parts[prefix]

    def silent_looks(self) -> int:
        """How many times in a row this was called during one and the same question."""
        waits = self._questions != self._answers
        self._looks = self._looks + 1 if waits and self._questions == self._seen else 0
        self._seen = self._questions
        return max([self._looks, *(part.silent_looks() for part in list(self._parts.values()))])

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)

        def ask(*words: Any) -> Any:
            self._canary.check()
            self._questions += 1
            answer = operation(*words)
            self._answers = self._questions
            return answer

        return ask


def first_line(error: BaseException) -> str:
    """Message of an error without the frames of C++ that torch appends."""
    text = str(error).partition("\nException raised from")[0].strip()
    first = text.splitlines()[0] if text else type(error).__name__
    return re.sub(r"^\[\S+:\d+\] ", "", first).partition(" This is typically")[0]
