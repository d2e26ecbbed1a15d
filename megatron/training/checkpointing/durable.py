"""Writing files so that a crash, a full disk or a power cut leaves either the old content or the new one.

Files are written under a temporary name in their final directory, synced, and renamed; a rename
is atomic inside one file system, and durable once the directory is synced as well.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from megatron.core.errors import CheckpointError
from megatron.training.processes import stop_signals

_STAGING_SUFFIX = ".saving"


def check_save_directory(path: str) -> None:
    """Create the save directory and prove that files can be written there.

    Call it before training starts, so that a wrong path costs seconds and not the first save interval.

    Raises:
        CheckpointError: the directory cannot be made or written.
    """
    with _os_errors_explained(path):
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".write_test.{os.getpid()}")
        try:
            with open(probe, "wb") as file:
                file.write(b"x")
                file.flush()
                os.fsync(file.fileno())
        finally:
            with contextlib.suppress(OSError):
                os.unlink(probe)


def staging_directory(directory: str) -> str:
    """Hidden directory beside ``directory``, in which its content is written; the same on every rank."""
    parent, name = os.path.split(directory)
    return os.path.join(parent, f".{name}{_STAGING_SUFFIX}")


def remove_leftovers(parent: str) -> None:
    """Delete the staging directories that interrupted saves left behind."""
    for entry in os.listdir(parent) if os.path.isdir(parent) else []:
        if entry.startswith(".") and entry.endswith(_STAGING_SUFFIX):
            shutil.rmtree(os.path.join(parent, entry), ignore_errors=True)


def write_file(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Make the file ``path`` by ``write(file)`` and sync it; its directory is made as needed.

    Raises:
        CheckpointError: the system refused; the message has its reason.
    """
    with _os_errors_explained(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as raw:
            file = _ErrorKeepingFile(raw)
            try:
                write(cast(BinaryIO, file))  # in all that is asked of it here
            except Exception:
                # torch's zip writer turns the system's error, or a stop, into a RuntimeError of its own.
                stop_signals.raise_again()
                if file.error is not None:
                    raise file.error from None
                raise
            raw.flush()
            os.fsync(raw.fileno())


def publish(staging: str, final: str) -> None:
    """Give the files of ``staging`` their final names and sync the directories.

    A directory that does not exist yet appears as a whole. In one that does (an iteration saved again after
    an older checkpoint was resumed) each file is replaced on its own, so none is ever missing.
    """
    with _os_errors_explained(final):
        for directory, _, _ in os.walk(staging):
            sync_directory(directory)
        if not os.path.isdir(final):
            os.rename(staging, final)
        else:
            _move_files_over(staging, final)
        sync_directory(os.path.dirname(final))


def _move_files_over(staging: str, final: str) -> None:
    for directory, _, files in os.walk(staging):
        target = os.path.normpath(os.path.join(final, os.path.relpath(directory, staging)))
        os.makedirs(target, exist_ok=True)
        for file in files:
            os.replace(os.path.join(directory, file), os.path.join(target, file))
        sync_directory(target)
    sync_directory(final)
    shutil.rmtree(staging, ignore_errors=True)


def replace_file(path: str, content: bytes) -> None:
    """Replace a small file atomically."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with _os_errors_explained(path):
        try:
            write_file(temporary, lambda file: file.write(content))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Sync the names in a directory, where the file system supports it."""
    descriptor = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


class _ErrorKeepingFile:
    """A binary file that keeps the first error of the system, which torch replaces by one of its own."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


@contextlib.contextmanager
def _os_errors_explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "Give --save a directory that this user can write"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            remedy = "Free space there, or give --save a directory on another disk"
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"cannot write {path}: {reason}. {remedy}; checkpoints that were complete before are untouched."
        ) from error
