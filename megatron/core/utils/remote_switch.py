"""A switch that another program on this machine turns by an HTTP request."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Who steers a job is logged in on its host, if only by `ssh -L`: the port is not open to the network.
_HOST = "127.0.0.1"
# How long a client may take for its request, and the thread to notice that it should end; seconds.
_REQUEST_S, _POLL_S = 5.0, 0.1


class _Handler(BaseHTTPRequestHandler):
    """GET / turns the switch, GET /status asks; both answer with a line of text."""

    timeout = _REQUEST_S
    switch: RemoteSwitch

    def do_GET(self) -> None:
        if self.path == "/":
            self._answer(200, f"{self.switch.name} will be {_word(self.switch.turn())}\n")
        elif self.path == "/status":
            self._answer(200, f"{self.switch.name}: {_word(self.switch.is_on)}\n")
        else:
            self._answer(404, "GET / turns the switch, GET /status tells how it stands\n")

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *unused: object) -> None:
        """Requests are no part of the job's log."""


class RemoteSwitch:
    """Listens on a port of the loopback interface until it is closed.

    Args:
        name: of what is switched, for answers.
        port: to listen on; 0 for any free one.
        is_on: how the switch stands at first.

    Attributes:
        port: listened on.
        is_on: as the last request left it.

    Raises:
        OSError: the port is in use, or may not be used.
    """

    def __init__(self, name: str, port: int, is_on: bool):
        self.name, self.is_on = name, is_on
        self._lock = threading.Lock()
        handler = type("_HandlerOfThisSwitch", (_Handler,), {"switch": self})
        self._server = ThreadingHTTPServer((_HOST, port), handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name=f"switch-{name}", daemon=True
        )
        self._thread.start()

    def turn(self) -> bool:
        """The other way; returns how it stands then."""
        with self._lock:
            self.is_on = not self.is_on
            return self.is_on

    def close(self) -> None:
        """Frees the port and ends the thread."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _word(is_on: bool) -> str:
    return "on" if is_on else "off"
