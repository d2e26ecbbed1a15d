"""The launcher of this process: which rank it makes of it, how it learns of failures, and when it ends."""

import contextlib
import fcntl
import json
import os
import re
import select
import socket
from collections.abc import MutableMapping

from megatron.core.errors import ConfigError

# RANK, WORLD_SIZE and LOCAL_RANK under launchers other than torchrun, and the number of local ranks.
_OMPI = "OMPI_COMM_WORLD_"
_WORDS = (
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    (f"{_OMPI}RANK", f"{_OMPI}SIZE", f"{_OMPI}LOCAL_RANK", f"{_OMPI}LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
_TORCHRUN = (b"torchrun", b"torch.distributed.run", b"torch.distributed.launch")
_FIRST_PORT, _PORTS = 20000, 10000


def set_rank_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables from those of srun or mpirun, where they are not set.

    MASTER_ADDR comes from the list of the step's nodes (Slurm), or is this machine where all ranks are local;
    across machines under mpirun it must be given. MASTER_PORT follows from the number of the job.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return
    for rank, size, local_rank, local_size in _WORDS:
        world = environment.get(size, "")
        if rank not in environment or not world.isdigit() or int(world) < 2:
            continue
        environment["RANK"], environment["WORLD_SIZE"] = environment[rank], world
        environment.setdefault("LOCAL_RANK", environment.get(local_rank, "0"))
        local = re.match(r"\d+", environment.get(local_size, ""))
        if local:
            environment.setdefault("LOCAL_WORLD_SIZE", local.group())
        address = _first_host(environment.get("SLURM_STEP_NODELIST", ""))
        if not address and local and local.group() == world:
            address = "localhost"
        if address:
            environment.setdefault("MASTER_ADDR", address)
        job = re.sub(r"\D", "", environment.get("SLURM_JOB_ID", "")) or "0"
        environment.setdefault("MASTER_PORT", str(_FIRST_PORT + int(job) % _PORTS))
        return


def _first_host(nodes: str) -> str:
    """``n[03-07,9],m1`` -> ``n03``; "" for an empty list."""
    bracket = re.match(r"([^,\[]+)\[([^\],-]+)[^\]]*\]([^,]*)", nodes)
    if bracket:
        return "".join(bracket.groups())
    return nodes.split(",", maxsplit=1)[0]


def has_other_ranks() -> bool:
    """Whether this process is one of several ranks."""
    size = os.environ.get("WORLD_SIZE", "")
    return os.environ.get("RANK", "").isdigit() and size.isdigit() and int(size) > 1


def check_network() -> None:
    """Look up what this rank needs to reach the others, instead of waiting for what cannot come.

    Raises:
        ConfigError: this machine does not know the machine of MASTER_ADDR, or lacks a network interface of
            GLOO_SOCKET_IFNAME. (NCCL and HCCL take patterns, and report errors in theirs themselves.)
    """
    address = os.environ.get("MASTER_ADDR", "")
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"MASTER_ADDR={address}: {socket.gethostname()} knows no machine of that name ({error}); give "
            "the name or the address of the host of rank 0, on all ranks"
        ) from None
    wanted = os.environ.get("GLOO_SOCKET_IFNAME", "")
    here = [name for _, name in socket.if_nameindex()]
    missing = [name for name in wanted.split(",") if name and name not in here]
    if missing:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME={wanted}: {socket.gethostname()} has no network interface "
            f"{', '.join(missing)}; use one of {', '.join(here)}, or unset it"
        )


def describe() -> str:
    """Rank and host of this process, for messages."""
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def write_torchrun_error(message: str, failed_at: float) -> None:
    """Give torchrun the cause of a failure, which it prints at its end.

    Torchrun gives its processes the name of a file, and takes the earliest error there as the root cause.
    Without that name nothing is written.

    Args:
        message: what to show.
        failed_at: seconds since the epoch.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    data = {"message": {"message": message, "extraInfo": {"timestamp": str(int(failed_at))}}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump(data, file)


def above_standard_streams(descriptor: int) -> int:
    """Move a descriptor to a number above the standard streams, which may be closed in this process."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return moved


class LauncherWatch:
    """Detects the end of torchrun, or of the launch script, with which this process ends.

    Other launchers and shells are not watched: a rank that was started by hand outlives its shell, and srun
    and mpirun end their ranks themselves.

    Attributes:
        descriptors: readable when a launcher has ended; empty where the system does not support that.
    """

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._pids = [_torchrun()] if "TORCHELASTIC_RUN_ID" in os.environ else []
        script = os.environ.get("MEGATRON_LAUNCHER_PID", "")
        if script.isdigit() and int(script) in _ancestors():
            self._pids.append(int(script))
        self.descriptors: list[int] = []
        for pid in self._pids if hasattr(os, "pidfd_open") else []:
            with contextlib.suppress(OSError):
                self.descriptors.append(above_standard_streams(os.pidfd_open(pid)))

    def is_gone(self) -> bool:
        """Whether a launcher has ended."""
        if self.descriptors and select.select(self.descriptors, [], [], 0)[0]:
            return True
        return any(not self._exists(pid) for pid in self._pids)

    def forget(self) -> None:
        """Stop watching."""
        self._pids, self.descriptors = [], []

    def _exists(self, pid: int) -> bool:
        if pid == self._parent:
            return os.getppid() == pid
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # of another user
            return True
        return True


def _torchrun() -> int:
    """The nearest ancestor that is torchrun; without one, the parent process.

    A shell or a program such as numactl may be between, and outlives torchrun.
    """
    for pid, words in _ancestors().items():
        if any(os.path.basename(word) in _TORCHRUN for word in words):
            return pid
    return os.getppid()


def _ancestors() -> dict[int, list[bytes]]:
    """Ancestors of this process with their command lines, the nearest first."""
    found: dict[int, list[bytes]] = {}
    pid = os.getppid()
    while pid > 0:
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                found[pid] = file.read().split(b"\0")
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError):  # no such system
            break
    return found
