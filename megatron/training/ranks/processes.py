"""Processes of this machine: whether they still run, without being their parent."""

import contextlib
import hashlib
import os
import socket
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One process, told apart from a later one with the same number.

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


class FirstOnHost:
    """Lets one process of a machine speak where ranks cannot agree through a store.

    The first to bind a name that only the system keeps has it until it ends; no file stays behind.
    """

    def __init__(self, name: str):
        self._name, self._socket = name, None

    def claim(self) -> bool:
        """True for the first process; True for all where the system has no such names."""
        if self._socket is not None:
            return True
        if not hasattr(socket, "AF_UNIX"):
            return True
        digest = hashlib.sha256(self._name.encode()).hexdigest()[:32]  # such names are short
        holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            holder.bind(f"\0megatron {digest}")
        except FileNotFoundError:  # a system with such sockets, but not with such names
            holder.close()
            return True
        except OSError:
            holder.close()
            return False
        self._socket = holder
        return True

    def release(self) -> None:
        """Let others speak."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
            self._socket = None
