"""A directory that is either complete or not there, however many processes ask for it at once."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.training import stop_signals

MANIFEST = "manifest.json"


def is_complete(directory: Path) -> bool:
    """Whether every file that was there when the directory was finished still has its size."""
    try:
        sizes = json.loads((directory / MANIFEST).read_text())
        return all((directory / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def build_once(directory: Path, build: Callable[[Path], None], say: Callable[[str], None]) -> bool:
    """Make ``directory`` with ``build(unfinished directory)`` unless it is complete already.

    The build happens in a neighbour that is renamed at the end, under a file lock: a killed build
    leaves nothing that looks finished, and a second process waits and then finds the work done.

    Args:
        directory: the final place.
        build: fills the directory it is given; what it raises passes through.
        say: receives progress lines.

    Returns:
        True when this call built it.
    """
    if is_complete(directory):
        return False
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _lock(directory.with_name(directory.name + ".lock"), say):
        if is_complete(directory):
            return False
        if directory.exists():
            say(f"{directory} is incomplete: it is made again")
            shutil.rmtree(directory)
        # Nobody works on it: we hold the lock, so it was left by a process that died.
        unfinished = directory.with_name(directory.name + ".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        with stop_signals.unfinished(str(unfinished)):
            unfinished.mkdir()
            build(unfinished)
            _write_manifest(unfinished)
            os.rename(unfinished, directory)
    return True


def _write_manifest(directory: Path) -> None:
    files = sorted(path for path in directory.iterdir() if path.is_file())
    sizes = {path.name: path.stat().st_size for path in files}
    (directory / MANIFEST).write_text(json.dumps(sizes, indent=1))


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold an exclusive lock that the system releases when the process ends, however it ends."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is making the same files: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
