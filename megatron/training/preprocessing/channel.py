"""Messages between processes: small parts through a pipe, arrays and long bytes through shared memory.

A pipe copies every byte into the kernel and out again, piece by piece; a mapping that was made before the
fork is written once and read where it lies.
"""

import mmap
import pickle
from multiprocessing.connection import Connection
from typing import Any

_ALIGNMENT = 64


class SharedSlots:
    """Pieces of memory that this process and the ones forked from it see alike.

    Args:
        count: number of slots; 0 where processes do not begin as forks, and then all goes through the pipe.
        slot_bytes: size of each; pages that are never touched cost nothing.
    """

    def __init__(self, count: int, slot_bytes: int):
        self._slots = [memoryview(mmap.mmap(-1, slot_bytes)) for _ in range(count)]

    def __getitem__(self, number: int) -> memoryview:
        """The slot for message ``number``; messages share a slot when they are ``count`` apart."""
        return self._slots[number % len(self._slots)] if self._slots else memoryview(b"")


def send(connection: Connection, message: Any, slot: memoryview) -> None:
    """Send a message; its arrays go into ``slot`` or, if that is too small, behind it through the pipe."""
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    views = [array.raw() for array in arrays]
    starts, end = [], 0
    for view in views:
        starts.append(end)
        end += -(-view.nbytes // _ALIGNMENT) * _ALIGNMENT
    shared = end <= slot.nbytes
    if shared:
        for start, view in zip(starts, views, strict=True):
            slot[start : start + view.nbytes] = view
    connection.send_bytes(pickle.dumps((body, shared, [view.nbytes for view in views])))
    for view in () if shared else views:
        connection.send_bytes(view)


def receive(connection: Connection, slot: memoryview) -> Any:
    """Inverse of :func:`send`; arrays in the message are views of ``slot``, good until its next use."""
    body, shared, sizes = pickle.loads(connection.recv_bytes())
    if not shared:
        return pickle.loads(body, buffers=[connection.recv_bytes() for _ in sizes])
    views, start = [], 0
    for size in sizes:
        views.append(slot[start : start + size])
        start += -(-size // _ALIGNMENT) * _ALIGNMENT
    return pickle.loads(body, buffers=views)
