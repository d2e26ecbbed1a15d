"""Telemetry that finds slow ranks: times a region of each step and compares it between ranks."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)


class StragglerDetector:
    """The one detector of this process; a context manager around the timed region.

    Until :meth:`configure` switches it on, entering and leaving it does nothing. Calling it with
    ``bdata=True`` makes the next region count as data loading:
    ``with detector(bdata=True): batch = next(iterator)``.
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
        self._on = False
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
        """Sets the size of the world, this rank, and how many ranks to name in a report.

        ``amp``, ``port`` and ``prefill`` belong to a remote control and an event pool that this detector does
        not have; they are accepted for callers' sake.
        """
        if not StragglerDetector._configured:
            self.world, self.rank, self.mmcnt, self.amp = world, rank, max(1, mmcnt), amp
            self._on = enabled
            StragglerDetector._configured = True
            self.reset()

    def reset(self) -> None:
        """Forgets what was measured since the last report."""
        self._regions_s: list[float] = []
        self._data_s: list[float] = []
        self._next_is_data = False
        self._started_s: float | None = None

    def start_method(self) -> None:
        """Starts the clock of a region."""
        self._started_s = time.perf_counter()

    def stop_method(self) -> None:
        """Stops it and files the time."""
        if self._started_s is None:
            return
        (self._data_s if self._next_is_data else self._regions_s).append(
            time.perf_counter() - self._started_s
        )
        self._started_s, self._next_is_data = None, False

    def null_method(self) -> None:
        """Does nothing: what start and stop are while the detector is off."""

    def elapsed(self) -> tuple[float, float, int, int, int, int]:
        """(mean ms of a region, mean ms of data loading, temperature, power, utilisation, clock).

        The last four are 0: the device's sensors are not read.
        """
        return _mean_ms(self._regions_s), _mean_ms(self._data_s), 0, 0, 0, 0

    def report(self, total_flops: float = 0.0, log_interval: int = 0) -> bool:
        """Gathers the mean times of all ranks, logs the fastest and slowest, and starts afresh.

        Args:
            total_flops: floating-point operations of the whole job since the last report.
            log_interval: steps since the last report; 0 switches the report off.

        Returns:
            True if the detector is on and reported.
        """
        if not self.enabled or log_interval <= 0:
            return False
        region_ms, data_ms, *_ = self.elapsed()
        rows = [(region_ms, data_ms, self.rank)]
        if dist.is_initialized():
            gathered: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, rows[0])
            rows = gathered
        self.reset()
        if self.rank == 0:
            rows.sort()
            shown = ", ".join(
                f"rank {rank}: {ms:.2f} ms (data {data:.2f})" for ms, data, rank in rows[: self.mmcnt]
            )
            slow = ", ".join(
                f"rank {rank}: {ms:.2f} ms (data {data:.2f})" for ms, data, rank in rows[-self.mmcnt :]
            )
            seconds = rows[-1][0] * 1e-3 * log_interval
            tflops = total_flops / seconds / self.world * 1e-12 if seconds else 0.0
            logger.info(
                "regions per rank | fastest %s | slowest %s | %.2f TFLOP/s per rank", shown, slow, tflops
            )
        return True

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

    def __call__(self, bdata: bool = False) -> StragglerDetector:
        self._next_is_data = bdata
        return self

    def __enter__(self) -> StragglerDetector:
        if self._on:
            self.start_method()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._on:
            self.stop_method()


def _mean_ms(times_s: list[float]) -> float:
    return 1e3 * sum(times_s) / len(times_s) if times_s else 0.0
