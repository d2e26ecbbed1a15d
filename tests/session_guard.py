"""A run of the suite leaves nothing behind: no file in the system's temporary folder or caches, no process.

All processes of a run have one folder of the run as their temporary folder and cache. At the end, whatever
is still in it, every process that still has it in its environment, and every new file of shared memory fails
the run by name; then they are removed. A run with a failing test keeps its folder until the next run, and
says where it is.
"""

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from multiprocessing import forkserver, util
from pathlib import Path

import pytest

SHARED_MEMORY = Path("/dev/shm")
# Made once a run, for all its tests: pytest's own folder, the C libraries that tests/npu compiles, sockets of
# multiprocessing, which removes them when the interpreter ends. And what torchrun never removes.
EXPECTED = ("pytest-of-", "megatron-npu-cann-", "pymp-", "torchelastic_", "cache", "lock of the run")
PREFIX, LOCK = "megatron-suite-", "lock of the run"
CACHES = ("MEGATRON_CACHE", "XDG_CACHE_HOME", "MPLCONFIGDIR", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR")
# A process that has been told to end may need this long on a loaded machine.
PATIENCE_S = 20.0


class SessionGuard:
    """Pytest plug-in of the process that starts a run; workers of xdist inherit its folder."""

    def __init__(self) -> None:
        _remove_folders_of_dead_runs()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.folder.chmod(0o755)  # like the system's own: a test may become another user
        self._lock = open(self.folder / LOCK, "w")  # noqa: SIM115 - as long as this process lives
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        # Also where a test gives a process a temporary folder of its own, inside.
        self._marker = str(self.folder).encode()
        self._environment = {"TMPDIR": os.environ.get("TMPDIR")}
        os.environ["TMPDIR"] = str(self.folder)
        for name in CACHES:
            self._environment[name] = os.environ.get(name)
            os.environ[name] = str(self.folder / "cache" / name.lower())
        tempfile.tempdir = None
        self._shared_before = _shared_memory()
        self.keep = False
        self._found: list[str] = []

    @pytest.hookimpl(trylast=True)  # after xdist has ended its workers
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        end_helpers()
        self.keep = session.exitstatus == pytest.ExitCode.TESTS_FAILED
        self._found = [] if self.keep else self.leftovers()
        if self._found:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self._found:
            terminalreporter.write_line(f"ERROR left behind by a test: {line}", red=True)
        if self.keep:
            terminalreporter.write_line(f"Files of this run are kept in {self.folder}")

    def pytest_unconfigure(self) -> None:
        for pid in self._processes():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if not self.keep:
            # After multiprocessing has removed what it has there.
            util.Finalize(None, self.remove_folder, exitpriority=-200)
        for name, value in self._environment.items():
            os.environ.pop(name, None)
            os.environ |= {} if value is None else {name: value}
        tempfile.tempdir = None

    def remove_folder(self) -> None:
        """Remove the folder of this run with everything in it."""
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def leftovers(self) -> list[str]:
        """What this run has left so far, by name. Waits for what is on its way out."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := self._leftovers()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _leftovers(self) -> list[str]:
        processes = [f"process {pid}: {_command(pid)}" for pid in self._processes()]
        files = [str(path) for path in self.folder.iterdir() if not path.name.startswith(EXPECTED)]
        shared = [path for path in _shared_memory() - self._shared_before if not _is_used(path)]
        return sorted(processes) + sorted(files) + sorted(shared)

    def _processes(self) -> list[int]:
        """Processes of this run other than this one and its resource tracker, where the system lists them."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = self._marker in (folder / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            tracker = "resource_tracker" in _command(int(folder.name))
            if ours and int(folder.name) != os.getpid() and not tracker:
                found.append(int(folder.name))
        return found


def _remove_folders_of_dead_runs() -> None:
    """Remove what killed runs have left, and what failed ones kept: their locks are free."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        with contextlib.suppress(OSError), open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)


def end_helpers() -> None:
    """End what tests of this process share: the ranks of the pool, and the server that forks them."""
    pool = sys.modules.get("tests.distributed.pool")
    if pool is not None:
        pool.close()
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    forkserver._forkserver._stop()


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return b" ".join(words).decode(errors="replace")[:200]


def _shared_memory() -> set[str]:
    """Files of shared memory that belong to this user."""
    found = set()
    for path in SHARED_MEMORY.glob("*"):
        with contextlib.suppress(OSError):  # gone in the meantime
            if path.stat().st_uid == os.getuid():
                found.add(str(path))
    return found


def _is_used(path: str) -> bool:
    """Whether a process, of this run or another, has a file of shared memory mapped."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if path.encode() in maps.read_bytes():
                return True
    return False
