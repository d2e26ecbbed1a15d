"""Worker processes and signals: a signal to a whole process group is handled by the owner of the workers.

Schedulers, terminals and torchrun send a signal to all processes of a rank. Workers that ended at once would
take away the data that the last step before a save needs; they end when their rank ends them, or is gone.
"""

import multiprocessing
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megatron.core.errors import ConfigError

# SIGTERM is how multiprocessing and torch end workers that are left.
_FOR_THE_GROUP = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
}
_POLL_S = 1.0
# Bytes of the path of a Unix socket that Linux takes, and of what multiprocessing adds to the directory.
_LONGEST_ADDRESS = 107
_SOCKET_NAME = len("/pymp-12345678/listener-12345678")
_SHORT_DIRECTORY = "/tmp"


def shorten_socket_directory() -> None:
    """Let multiprocessing keep its sockets in a directory whose name fits into a socket address.

    Workers pass tensors through sockets under the temporary directory. Where its name is too long the error
    stays in a thread of the worker, and the rank waits for the batch without end.

    Raises:
        ConfigError: the temporary directory is too deep, and /tmp cannot be used instead.
    """
    directory = tempfile.gettempdir()
    if len(os.fsencode(directory)) + _SOCKET_NAME <= _LONGEST_ADDRESS:
        return
    kept, tempfile.tempdir = tempfile.tempdir, _SHORT_DIRECTORY
    try:
        multiprocessing.util.get_temp_dir()  # made once, and inherited by every worker
    except OSError as error:
        raise ConfigError(
            f"the temporary directory {directory} has too long a name for the sockets of data loading "
            f"processes, and {_SHORT_DIRECTORY} cannot be used instead ({error.strerror}): set TMPDIR to a "
            "directory with a short name, or use --num-workers 0"
        ) from error
    finally:
        tempfile.tempdir = kept


@contextmanager
def starting_workers() -> Iterator[None]:
    """Context to start workers in: signals are blocked until the workers have set their handlers.

    Signals to this process meanwhile arrive at the end of the context, or in another thread.
    """
    shorten_socket_directory()
    kept = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_GROUP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, kept)


def ignore_signals() -> None:
    """In a worker that ends with the pipe to its owner: leave signals to the owner."""
    for number in _FOR_THE_GROUP:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_GROUP)


def follow_only_the_rank(worker_id: int, further: Callable[[int], object] | None = None) -> None:
    """In a data-loading worker (``worker_init_fn``): leave signals to the rank, and end when it is gone.

    SIGTERM from the rank itself ends the worker, as torch's loader and ``multiprocessing`` expect.

    Args:
        worker_id: number of the worker.
        further: another function to call with ``worker_id``.
    """
    _leave_signals_to_rank()
    if further is not None:
        further(worker_id)


def _leave_signals_to_rank() -> None:
    for number in _FOR_THE_GROUP - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    rank = multiprocessing.parent_process()
    if rank is None or not hasattr(signal, "sigtimedwait"):  # as on a Mac: torch's handler stays
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _FOR_THE_GROUP)
        return
    # Waiting for a signal gives its sender, which a Python handler does not get.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    threading.Thread(target=_wait_for_end_of_rank, args=(rank.pid,), name="signals", daemon=True).start()


def _wait_for_end_of_rank(pid: int) -> None:
    while True:
        received = signal.sigtimedwait({signal.SIGTERM}, _POLL_S)
        if os.getppid() != pid or (received is not None and received.si_pid == pid):
            os._exit(0)
