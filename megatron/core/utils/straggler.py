"""Telemetry that finds slow ranks: times a region of each step and compares it between ranks.

Another program on the same machine switches it on and off by an HTTP request.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import torch.distributed as dist

from megatron.core import accelerator

logger = logging.getLogger(__name__)

# Who steers a job is logged in on its host, if only by `ssh -L`: the port is not open to the network.
_HOST = "127.0.0.1"
# How long a client may take for its request, and the thread to notice that it should end; seconds.
_REQUEST_S, _POLL_S = 5.0, 0.1


class StragglerDetector:
    """The one detector of this process; a context manager around the timed region.

    Until :meth:`configure` switches it on, entering and leaving it does nothing. Calling it with
    ``bdata=True`` makes the next region count as data loading:
    ``with detector(bdata=True): batch = next(iterator)``. While it is on, both ends of a region wait for the
    device, so that its work counts.

    Rank 0 listens on a port of its host's loopback interface: ``curl http://127.0.0.1:PORT/`` switches all
    ranks on or off with their next :meth:`report`, ``curl http://127.0.0.1:PORT/status`` tells what was asked
    for.
    """

    _instance: StragglerDetector | None = None
    _configured = False

    def __new__(cls) -> StragglerDetector:
        if cls._instance is None:
            cls._instance = super().__new__(cls)
            cls._instance._clear()
        return cls._instance

    def _clear(self) -> None:
        self.world, self.rank, self.mmcnt, self.amp = 1, 0, 1, 3.0
        self._on = self._paused = False
        self._switch: RemoteSwitch | None = None
        self.reset()

    def configure(
        self,
        world: int,
        rank: int,
        mmcnt: int = 1,
        amp: float = 3.0,
        port: int = 65535,
        prefill: int = 1024,
        enabled: bool = False,
    ) -> None:
        """Sets up this rank, once; on rank 0 the switch is open from here on.

        Args:
            world: ranks of the job.
            rank: of this process.
            mmcnt: how many ranks a report names at each end.
            amp: work of a step over the work in the timed regions; 3 where they hold forward passes only.
            port: that rank 0 listens on, 0 for any free one. One that is in use is told, and nobody can
                switch then.
            prefill: size of a pool of events, of which this detector needs none.
            enabled: measure from the start.
        """
        if StragglerDetector._configured:
            return
        self._close_switch()
        self.world, self.rank, self.mmcnt, self.amp = world, rank, max(1, mmcnt), amp
        self._on = enabled
        StragglerDetector._configured = True
        self.reset()
        if rank == 0:
            self._open_switch(port)

    def close(self) -> None:
        """Switches off, frees the port, and lets :meth:`configure` set up anew."""
        self._close_switch()
        self._on = False
        self.reset()
        StragglerDetector._configured = False

    def _open_switch(self, port: int) -> None:
        try:
            self._switch = RemoteSwitch("the straggler detector", port, self._on)
        except (OSError, OverflowError) as error:
            logger.warning(
                "port %s cannot be listened on (%s): the straggler detector stays %s; choose another",
                port,
                error,
                "on" if self._on else "off",
            )

    def _close_switch(self) -> None:
        if self._switch is not None:
            self._switch.close()
            self._switch = None

    @property
    def port(self) -> int | None:
        """That this rank listens on; None where it does not."""
        return None if self._switch is None else self._switch.port

    # --- measuring ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets what was measured since the last report."""
        self._regions_s: list[float] = []
        self._data_s: list[float] = []
        self._next_is_data = False
        self._started_s: float | None = None

    def start_method(self) -> None:
        """Starts the clock of a region."""
        accelerator.synchronize()
        self._started_s = time.perf_counter()

    def stop_method(self) -> None:
        """Stops it and files the time."""
        if self._started_s is None:
            return
        accelerator.synchronize()
        times_s = self._data_s if self._next_is_data else self._regions_s
        times_s.append(time.perf_counter() - self._started_s)
        self._started_s, self._next_is_data = None, False

    def null_method(self) -> None:
        """Does nothing: what start and stop are while the detector is off."""

    def elapsed(self) -> tuple[float, float, int, int, int, int]:
        """(ms in regions, ms of the longest data loading, temperature, power, utilisation, clock).

        Since the last report. The last four are 0: the device's sensors are not read.
        """
        return 1e3 * sum(self._regions_s), 1e3 * max(self._data_s, default=0.0), 0, 0, 0, 0

    def __call__(self, bdata: bool = False) -> StragglerDetector:
        self._next_is_data = bdata
        return self

    def __enter__(self) -> StragglerDetector:
        if self._on and not self._paused:
            self.start_method()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._on:
            self.stop_method()
        self._next_is_data = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is measured, such as an evaluation between two steps."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    # --- telling --------------------------------------------------------------------------------------------

    def report(self, total_flops: float = 0.0, log_interval: int = 0) -> bool:
        """Gathers the times of all ranks, logs the slowest and fastest on rank 0, and starts afresh.

        All ranks call this together: here they also learn how the switch stands.

        Args:
            total_flops: floating-point operations of the whole job since the last report.
            log_interval: steps since the last report; 0 leaves the report out.

        Returns:
            True if the detector was on and reported.
        """
        reports = self._on and log_interval > 0
        if reports:
            rows = self._gather(log_interval)
            self.reset()
            if self.rank == 0:
                self._log(rows, total_flops / log_interval)
        if StragglerDetector._configured:
            self._agree()
        return reports

    def _gather(self, steps: int) -> list[tuple[float, float, int]]:
        """(ms in regions per step, ms of the longest data loading, rank) of every rank."""
        region_ms, data_ms, *_ = self.elapsed()
        own = torch.tensor(
            [region_ms / steps, data_ms], dtype=torch.float32, device=accelerator.current_device()
        )
        everyone = [own]
        if _shares_work():
            everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, own)
        return [(*row.tolist(), rank) for rank, row in enumerate(everyone)]

    def _log(self, rows: list[tuple[float, float, int]], flops_per_step: float) -> None:
        rows = sorted(rows, reverse=True)
        count = min(self.mmcnt, len(rows))
        seconds = rows[0][0] * 1e-3 * self.amp
        tflops = flops_per_step / seconds / self.world * 1e-12 if seconds else 0.0
        logger.info(
            "time in the timed regions of a step | slowest %s | fastest %s | about %.2f TFLOP/s per rank",
            _shown(rows[:count]),
            _shown(rows[::-1][:count]),
            tflops,
        )

    def _agree(self) -> None:
        """Takes over on all ranks how rank 0's switch stands."""
        wanted = self._on if self._switch is None else self._switch.is_on
        if _shares_work():
            told = torch.tensor([int(wanted)], dtype=torch.int32, device=accelerator.current_device())
            dist.broadcast(told, src=0)
            wanted = bool(told.item())
        if wanted != self._on:
            self._on = wanted
            self.reset()
            if self.rank == 0:
                logger.info("the straggler detector is %s", "on" if wanted else "off")

    @property
    def enabled(self) -> bool:
        return self._on

    @property
    def configured(self) -> bool:
        return StragglerDetector._configured

    @property
    def my_rank(self) -> int:
        return self.rank

    @property
    def world_size(self) -> int:
        return self.world


def _shares_work() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _shown(rows: list[tuple[float, float, int]]) -> str:
    return ", ".join(f"rank {rank}: {ms:.2f} ms (data {data:.2f})" for ms, data, rank in rows)


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
