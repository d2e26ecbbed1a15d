"""Standard streams whose failure does not end a run.

A log may go to a pipe whose reader exits, to a disk that fills up, or to a terminal that is closed. ``print``
would then raise, on one rank of many and at any moment, and end a run that is otherwise healthy.
"""

import contextlib
import io
import os
import select
import sys
from typing import cast


class _TolerantFile(io.FileIO):
    """A file descriptor that drops what the system refuses to write."""

    def __init__(self, descriptor: int, label: str):
        super().__init__(descriptor, "wb", closefd=False)
        self._label = label
        self._warned = False

    def write(self, data: memoryview | bytes) -> int:
        """Write ``data``, in part or whole, or drop it; returns the number of bytes that are done with."""
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                self._warn(error)
                return memoryview(data).nbytes
            if written is not None:
                return written
            # The other side has made the pipe non-blocking, and it is full.
            select.select([], [self], [])

    def _warn(self, error: OSError) -> None:
        """Print one warning on the other stream, which may work."""
        if self._warned:
            return
        self._warned = True
        # Not through Python's stream over it, whose buffer may be in the middle of the same failure.
        other = 2 if self.fileno() == 1 else 1
        line = (
            f"WARNING: {self._label} cannot be written ({error.strerror}): the run goes on, what it prints "
            "there is lost\n"
        )
        with contextlib.suppress(OSError):
            os.write(other, line.encode())


def tolerate_failing_streams() -> None:
    """Let stdout and stderr drop what cannot be written, instead of raising. Calling it again is harmless.

    A stream that was replaced, such as a notebook or a test's capture, is left alone. Descriptors
    that were closed before the process began are opened on the null device; otherwise the next file that
    the run opens would get the number of stdout, and what libraries print would land in it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for label, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, label)
        if stream is None:
            setattr(sys, label, _stream(descriptor, label, "utf-8", line_buffering=True))
        elif _writes_to(stream, descriptor):
            with contextlib.suppress(OSError):
                stream.flush()
            setattr(sys, label, _stream(descriptor, label, stream.encoding, stream.line_buffering))


def _writes_to(stream: object, descriptor: int) -> bool:
    """Whether ``stream`` is Python's own text stream over ``descriptor``, and not tolerant yet."""
    if not isinstance(stream, io.TextIOWrapper) or isinstance(
        getattr(stream.buffer, "raw", None), _TolerantFile
    ):
        return False
    with contextlib.suppress(OSError, ValueError):
        return stream.fileno() == descriptor
    return False


def _stream(descriptor: int, label: str, encoding: str, line_buffering: bool) -> io.TextIOWrapper:
    buffer = io.BufferedWriter(cast(io.RawIOBase, _TolerantFile(descriptor, label)))
    # A path that the locale cannot write is no reason to end a run either.
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=line_buffering)
