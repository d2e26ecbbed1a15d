"""A TCP port for ranks to meet at, that no other process is given in the meantime.

A port that was free a moment ago may be taken when the ranks come to it: any other connection on the machine
can be given it. So it stays bound while the ranks run, without listening. A second socket may listen at a
port that is only bound if both say SO_REUSEADDR, as the server of ``torch.distributed`` does, and the system
gives the port to nobody who did not ask for it by number.
"""

import socket


class ReservedPort:
    """A port of ``host`` where one server may listen as long as this object lives, or its ``with`` block."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._holder = socket.socket()
        self._holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._holder.bind((host, 0))
        self.number: int = self._holder.getsockname()[1]

    def __str__(self) -> str:
        return str(self.number)

    def __enter__(self) -> "ReservedPort":
        return self

    def __exit__(self, *_: object) -> None:
        self._holder.close()

    def __del__(self) -> None:
        self._holder.close()
