"""Named timers and their report over all ranks."""

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import accelerator
from megatron.core.errors import ConfigError, UsageError

LOG_OPTIONS = ("max", "minmax", "all")
MAX_LOG_LEVEL = 2
_NAME_WIDTH = 48


class TimerBase(ABC):
    """A timer that adds up intervals."""

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def start(self, barrier: bool = False) -> None:
        """Begins an interval, after the device has finished and, with ``barrier``, all ranks are here."""

    @abstractmethod
    def stop(self, barrier: bool = False) -> None:
        """Ends the interval in the same way and adds it up."""

    @abstractmethod
    def reset(self) -> None:
        """Sets the sum of intervals to zero."""

    @abstractmethod
    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """Seconds added up."""


class DummyTimer(TimerBase):
    """Stands in for timers above the log level: measures nothing and never waits."""

    def __init__(self) -> None:
        super().__init__("dummy timer")

    def start(self, barrier: bool = False) -> None:
        """Nothing."""

    def stop(self, barrier: bool = False) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing."""

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        return 0.0

    def active_time(self) -> float:
        """Always 0."""
        return 0.0


class Timer(TimerBase):
    """A timer that waits for the device, so that queued work counts."""

    def __init__(self, name: str):
        super().__init__(name)
        self._elapsed_s = 0.0
        self._active_s = 0.0
        self._started_at: float | None = None
        self._barrier_group: dist.ProcessGroup | None = None

    def set_barrier_group(self, barrier_group: dist.ProcessGroup | None) -> None:
        """Ranks that a barrier of this timer waits for; None for all."""
        self._barrier_group = barrier_group

    def _settle(self, barrier: bool) -> float:
        """Waits as asked and reads the clock."""
        if barrier and _world_size() > 1:
            dist.barrier(group=self._barrier_group)
        accelerator.synchronize()
        return time.perf_counter()

    def start(self, barrier: bool = False) -> None:
        if self._started_at is not None:
            raise UsageError(f"timer {self.name!r} is running already: stop it before starting it again")
        self._started_at = self._settle(barrier)

    def stop(self, barrier: bool = False) -> None:
        if self._started_at is None:
            raise UsageError(f"timer {self.name!r} is not running: start it before stopping it")
        interval_s = self._settle(barrier) - self._started_at
        self._elapsed_s += interval_s
        self._active_s += interval_s
        self._started_at = None

    def reset(self) -> None:
        # A running interval is dropped as well; the time since creation stays.
        self._elapsed_s = 0.0
        self._started_at = None

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """Seconds added up, up to now if the timer is running; it goes on running then."""
        was_running = self._started_at is not None
        if was_running:
            self.stop(barrier=barrier)
        elapsed_s = self._elapsed_s
        if reset:
            self.reset()
        if was_running:
            self.start(barrier=barrier)
        return elapsed_s

    def active_time(self) -> float:
        """Seconds measured since the timer exists, whatever was reset."""
        return self._active_s


class Timers:
    """Registry of timers by name.

    Args:
        log_level: 0 to 2; timers of a higher level measure nothing.
        log_option: what a report shows of the ranks' times: ``max``, ``minmax`` or ``all``.

    Raises:
        ConfigError: another level or option.
    """

    def __init__(self, log_level: int, log_option: str):
        _check_level("log_level", log_level)
        if log_option not in LOG_OPTIONS:
            raise ConfigError(f"log_option {log_option!r} is not one of {', '.join(LOG_OPTIONS)}")
        self._log_level = log_level
        self._log_option = log_option
        self._timers: dict[str, Timer] = {}
        self._levels: dict[str, int] = {}
        self._dummy = DummyTimer()

    def __call__(self, name: str, log_level: int | None = None) -> Timer | DummyTimer:
        """The timer ``name``, made at level ``log_level`` (default 2) if it is new.

        Raises:
            ConfigError: a level that is not 0 to 2, or not the one that the timer was made with.
        """
        if name not in self._levels:
            level = MAX_LOG_LEVEL if log_level is None else log_level
            _check_level(f"level of timer {name!r}", level)
            self._levels[name] = level
            if level <= self._log_level:
                self._timers[name] = Timer(name)
        elif log_level is not None and log_level != self._levels[name]:
            raise ConfigError(
                f"timer {name!r} has level {self._levels[name]}: it cannot be had at level {log_level}"
            )
        return self._timers.get(name, self._dummy)

    def get_all_timers_string(
        self,
        names: list[str] | None = None,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> str | None:
        """Report of the timers ``names`` (default all) that have measured something, in milliseconds.

        To be called on all ranks.

        Args:
            normalizer: number that times are divided by, such as the iterations measured.

        Returns:
            The report, or None if no timer has anything to say.
        """
        if normalizer <= 0.0:
            raise ConfigError(f"normalizer {normalizer} of a timer report must be positive")
        title, format_line = _REPORTS[self._log_option]
        times = self._collect(names, reset, barrier, scale=1000.0 / normalizer)
        return (
            "\n".join([title, *(format_line(name, ranks) for name, ranks in times.items())])
            if times
            else None
        )

    def log(
        self,
        names: list[str] | None,
        rank: int | None = None,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> None:
        """Prints the report on ``rank`` (default the last); to be called on all ranks."""
        report = self.get_all_timers_string(names, normalizer, reset, barrier)
        printing_rank = _world_size() - 1 if rank is None else rank
        if report is not None and _rank() == printing_rank:
            print(report, flush=True)

    def write(
        self,
        names: list[str],
        writer: Any,
        iteration: int,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> None:
        """Hands the slowest rank's seconds to a TensorBoard ``writer`` (or None) as ``<name>-time``.

        With the option ``all``, and several ranks, each rank's as ``<name>-time/rank<r>``. To be called on
        all ranks.
        """
        times = self._collect(names, reset, barrier, scale=1.0 / normalizer)
        if writer is None:
            return
        for name, ranks in times.items():
            if self._log_option == "all" and len(ranks) > 1:
                for rank, seconds in enumerate(ranks):
                    writer.add_scalar(f"{name}-time/rank{rank}", seconds, iteration)
            else:
                writer.add_scalar(f"{name}-time", max(ranks), iteration)

    def _collect(
        self, names: list[str] | None, reset: bool, barrier: bool, scale: float
    ) -> dict[str, list[float]]:
        """Times of all ranks by name, scaled; names without time on any rank are left out."""
        wanted = list(self._timers) if names is None else names
        own = [
            self._timers[name].elapsed(reset=reset, barrier=barrier) if name in self._timers else 0.0
            for name in wanted
        ]
        by_rank = _gather(own)
        columns = {name: [times[i] * scale for times in by_rank] for i, name in enumerate(wanted)}
        return {name: times for name, times in columns.items() if max(times) > 0.0}


def _format_minmax(name: str, times_ms: list[float]) -> str:
    return f"    {_dotted(name)}: ({min(times_ms):.2f}, {max(times_ms):.2f})"


def _format_max(name: str, times_ms: list[float]) -> str:
    return f"    {_dotted(name)}: {max(times_ms):.2f}"


def _format_all(name: str, times_ms: list[float]) -> str:
    return "\n".join([f"  {name}:", *(f"     rank {rank:2d}: {ms:.2f}" for rank, ms in enumerate(times_ms))])


def _dotted(name: str) -> str:
    return f"{name} ".ljust(_NAME_WIDTH, ".")


_REPORTS: dict[str, tuple[str, Callable[[str, list[float]], str]]] = {
    "minmax": ("(min, max) time across ranks (ms):", _format_minmax),
    "max": ("max time across ranks (ms):", _format_max),
    "all": ("times across ranks (ms):", _format_all),
}


def _check_level(what: str, level: int) -> None:
    if not 0 <= level <= MAX_LOG_LEVEL:
        raise ConfigError(f"{what} is {level}: use 0 to {MAX_LOG_LEVEL}")


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _gather(values: list[float]) -> list[list[float]]:
    """``values`` of every rank, by rank."""
    if _world_size() == 1:
        return [values]
    own = torch.tensor(values, dtype=torch.float32, device=accelerator.current_device())
    gathered = [torch.empty_like(own) for _ in range(_world_size())]  # [world, timers]
    dist.all_gather(gathered, own)
    return torch.stack(gathered).tolist()


def timed(config: Any, name: str, log_level: int = 1) -> contextlib.AbstractContextManager[None]:
    """Context measured by the timer ``name`` of ``config.timers``; by nothing where that is None.

    Timers of level 1 wait for all ranks first where ``config.barrier_with_L1_time`` says so.
    """
    if config.timers is None:
        return contextlib.nullcontext()
    barrier = log_level == 1 and config.barrier_with_L1_time
    return _timed(config.timers(name, log_level=log_level), barrier)


@contextlib.contextmanager
def _timed(timer: Timer | DummyTimer, barrier: bool) -> Iterator[None]:
    timer.start(barrier=True) if barrier else timer.start()
    yield
    timer.stop()
