"""Checks of results while training: NaN, Inf, values that jump.

In the mode ``disabled``, the only one so far, a bad result stops the run (or is warned about) at once. The
other modes repeat an iteration to tell a broken device from a broken run.
"""

import logging
import math
import platform
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron import unbuilt
from megatron.core import accelerator
from megatron.core.errors import NotBuiltYetError, TrainingError

__getattr__ = unbuilt.names_of(__name__)

logger = logging.getLogger(__name__)


class RerunDiagnostic(str, Enum):
    """Verdict on a suspicious result."""

    CORRECT_RESULT = "correct_result"
    TRANSIENT_ERROR = "transient_error"
    PERSISTENT_ERROR = "persistent_error"


class RerunMode(str, Enum):
    """What the machine does about suspicious results."""

    DISABLED = "disabled"
    VALIDATE_RESULTS = "validate_results"
    REPORT_DETERMINISM_STATS = "report_determinism_stats"


class RerunState(Enum):
    """Where the machine stands within an iteration."""

    NOT_RUNNING_YET = 0
    INITIAL_RUN = 1
    RERUNNING_IN_PLACE = 2
    WILL_RERUN_FROM_CHECKPOINT = 3
    RERUNNING_FROM_CHECKPOINT = 4
    RERUNNING_AGAIN_FROM_CHECKPOINT = 5


class Caller(NamedTuple):
    """Where a result is validated."""

    filename: str
    lineno: int
    rank: int


class Call(NamedTuple):
    """One of the validations that a caller makes in an iteration, counted from 1."""

    caller: Caller
    sequence: int


class RerunDataIterator:
    """Iterator over the training batches, of the kind that a repeated iteration can rewind.

    Args:
        iterable: what yields the batches; an iterator is taken as it is.

    Batches are kept from one :meth:`advance` to the next, except while the machine is disabled: nothing is
    repeated then.
    """

    def __init__(self, iterable: Iterable[Any]):
        self.iterable = iter(iterable)
        self.saved_microbatches: list[Any] = []
        self.replaying = False
        self.replay_pos = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.replaying:
            if self.replay_pos < len(self.saved_microbatches):
                self.replay_pos += 1
                return self.saved_microbatches[self.replay_pos - 1]
            self.replaying = False
        batch = next(self.iterable)
        if get_rerun_state_machine().get_mode() is not RerunMode.DISABLED:
            self.saved_microbatches.append(batch)
        return batch

    def rewind(self) -> None:
        """Go back to the first batch of this iteration."""
        self.replaying, self.replay_pos = True, 0

    def advance(self) -> None:
        """Forget the batches of this iteration; the next one begins."""
        self.saved_microbatches, self.replaying, self.replay_pos = [], False, 0

    def state_dict(self) -> dict[str, Any]:
        """The batches kept and the place among them; not the state of what yields them."""
        return {
            "saved_microbatches": self.saved_microbatches,
            "replaying": self.replaying,
            "replay_pos": self.replay_pos,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` returned."""
        self.saved_microbatches = state_dict["saved_microbatches"]
        self.replaying = state_dict["replaying"]
        self.replay_pos = state_dict["replay_pos"]


# One iterator, several for virtual pipeline stages, or none on ranks that get no data.
DataIterators = RerunDataIterator | list[RerunDataIterator | None] | None


class RerunStateMachine:
    """Guards iterations and validates results.

    Args:
        state_save_func: returns state that must come back for a repeated iteration (random generators).
        state_restore_func: puts it back.
        mode: only ``RerunMode.DISABLED`` so far.
        error_injector: source of faults for trials; not built yet.
        result_rejected_tracker_filename: file to which rejected results are appended, for skipping their
            iterations.

    Attributes:
        current_iteration: number of the iteration being run, from 1; between iterations, of those done.

    Raises:
        NotBuiltYetError: another mode, or an error injector.
    """

    def __init__(
        self,
        state_save_func: Callable[[], Any] | None = None,
        state_restore_func: Callable[[Any], None] | None = None,
        mode: RerunMode = RerunMode.DISABLED,
        error_injector: Any | None = None,
        result_rejected_tracker_filename: str | None = None,
    ):
        if error_injector is not None:
            raise NotBuiltYetError("injecting errors", "error_injector", "Leave it out.")
        self.set_mode(mode)
        self.state_save_func = state_save_func
        self.state_restore_func = state_restore_func
        self.result_rejected_tracker_filename = result_rejected_tracker_filename
        self.state = RerunState.NOT_RUNNING_YET
        self.current_iteration = 0
        # Per context of is_unexpectedly_large: values seen, and the largest magnitude among the first.
        self._sample_counts: dict[str, int] = {}
        self._max_values: dict[str, float] = {}

    def set_mode(self, mode: RerunMode) -> None:
        """Changes the mode.

        Raises:
            NotBuiltYetError: any mode but ``disabled``.
        """
        if mode != RerunMode.DISABLED:
            raise NotBuiltYetError(
                "repeating iterations to validate results",
                f"rerun_mode {RerunMode(mode).value}",
                "Use disabled.",
            )
        self._mode = RerunMode(mode)

    def get_mode(self) -> RerunMode:
        """The mode in force."""
        return self._mode

    def should_run_forward_backward(self, data_iterator: DataIterators) -> bool:
        """True exactly once per iteration: the guard of a ``while`` loop around forward and backward."""
        if self.state is RerunState.NOT_RUNNING_YET:
            self.state = RerunState.INITIAL_RUN
            self.current_iteration += 1
            return True
        self.state = RerunState.NOT_RUNNING_YET
        return False

    def should_checkpoint_and_exit(self) -> tuple[bool, bool, int]:
        """(save a checkpoint?, leave the program?, exit status): never, without repeated iterations."""
        return False, False, 0

    def validate_result(
        self,
        result: Any,
        rejection_func: Callable[[Any], bool | torch.Tensor],
        message: str = "unexpected result",
        comparison_func: Callable[[Any, Any], float] | None = None,
        tolerance: float = 0.0,
        fatal: bool = True,
    ) -> None:
        """Checks a result of this iteration.

        Args:
            result: the value.
            rejection_func: True for a bad one.
            message: what is wrong with it then.
            comparison_func: distance of two results, and ``tolerance`` the largest harmless one: for modes
                that repeat
                the iteration.
            fatal: stop the run; else only warn.

        Raises:
            TrainingError: a bad result that is fatal.
        """
        if not rejection_func(result):
            return
        text = (
            f"Rank {_rank()}, node {platform.node()}, device {accelerator.current_device().index or 0}, "
            f"iteration {self.current_iteration}: Unexpected result {_plain(result)} (message='{message}')"
        )
        if self.result_rejected_tracker_filename is not None:
            with open(self.result_rejected_tracker_filename, "a", encoding="utf-8") as tracker:
                tracker.write(f"iteration={self.current_iteration} {text}\n")
        if fatal:
            raise TrainingError(text)
        logger.warning(text)

    def is_unexpectedly_large(
        self,
        result: torch.Tensor,
        threshold: float,
        context: str,
        num_samples: int = 100,
        resample: bool = False,
    ) -> bool:
        """True for ``threshold`` times the largest of the first ``num_samples`` values of its kind, or more.

        Args:
            result: one value.
            context: its kind, such as "loss".
            resample: forget the values seen and start again with this one.
        """
        value = abs(float(result))
        if resample:
            self._sample_counts.pop(context, None)
            self._max_values.pop(context, None)
        seen = self._sample_counts.get(context, 0)
        if seen >= num_samples:
            return value >= threshold * self._max_values[context]
        if math.isfinite(value):
            self._sample_counts[context] = seen + 1
            self._max_values[context] = max(self._max_values.get(context, 0.0), value)
        return False

    def state_dict(self, data_iterator: DataIterators, ckpt_format: str) -> dict[str, Any]:
        """State for a checkpoint, in plain types: the largest values seen go on counting after a restart."""
        return {
            "mode": self._mode.value,
            "current_iteration": self.current_iteration,
            "large_value_counts": dict(self._sample_counts),
            "max_values": dict(self._max_values),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the largest values seen; what else a foreign state holds concerns repetition."""
        sharded = state_dict.get("sharded")
        source = sharded if isinstance(sharded, dict) else state_dict
        self._sample_counts = {str(k): int(v) for k, v in (source.get("large_value_counts") or {}).items()}
        self._max_values = {str(k): float(v) for k, v in (source.get("max_values") or {}).items()}
        self.current_iteration = int(source.get("current_iteration", self.current_iteration))

    @classmethod
    def get_skipped_iterations_from_tracker_file(cls, tracker_file_name: str) -> list[int]:
        """Iterations to skip, counted from 0, out of a file of rejected results.

        Ascending; [] if there is no such file.
        """
        found = set()
        try:
            with open(tracker_file_name, encoding="utf-8") as tracker:
                for line in tracker:
                    word = line.split(" ", 1)[0]
                    if word.startswith("iteration="):
                        found.add(int(word.removeprefix("iteration=")) - 1)
        except FileNotFoundError:
            return []
        return sorted(found)


_GLOBAL_RERUN_STATE_MACHINE: RerunStateMachine | None = None


def initialize_rerun_state_machine(**kwargs: Any) -> None:
    """Makes this process's machine, with the arguments of :class:`RerunStateMachine`."""
    global _GLOBAL_RERUN_STATE_MACHINE
    _GLOBAL_RERUN_STATE_MACHINE = RerunStateMachine(**kwargs)


def get_rerun_state_machine() -> RerunStateMachine:
    """This process's machine, made in the mode ``disabled`` if there is none."""
    if _GLOBAL_RERUN_STATE_MACHINE is None:
        initialize_rerun_state_machine()
    assert _GLOBAL_RERUN_STATE_MACHINE is not None
    return _GLOBAL_RERUN_STATE_MACHINE


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _plain(result: Any) -> Any:
    """A one-element tensor as its number, so that the message shows ``nan`` and not a tensor."""
    return result.item() if isinstance(result, torch.Tensor) and result.numel() == 1 else result


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


class RerunValidationStatus(str, Enum):
    """What a line of a log file of validations reports."""

    RERUN_DISABLED = "rerun_disabled"
    INITIAL_RUN = "initial_run"
    FIRST_RERUN_NOT_REPRODUCIBLE = "first_rerun_not_reproducible"
    FIRST_RERUN_REPRODUCIBLE = "first_rerun_reproducible"
    SECOND_RERUN_NOT_REPRODUCIBLE = "second_rerun_not_reproducible"
    SECOND_RERUN_REPRODUCIBLE = "second_rerun_reproducible"


class RerunErrorInjector:
    """Source of faults for trials.

    Args:
        error_injection_rate: one result in so many is made wrong; only 0, never, so far.
        error_injection_type: which kind of fault.

    Raises:
        NotBuiltYetError: another rate than 0.
    """

    def __init__(
        self,
        error_injection_rate: int = 0,
        error_injection_type: RerunDiagnostic = RerunDiagnostic.TRANSIENT_ERROR,
    ):
        if error_injection_rate:
            raise NotBuiltYetError(
                "making results wrong on purpose", f"error_injection_rate {error_injection_rate}", "Pass 0."
            )
        self.error_injection_rate = error_injection_rate
        self.error_injection_type = RerunDiagnostic(error_injection_type)

    def maybe_inject(self) -> bool:
        """Whether the result at hand is to be made wrong: never, at rate 0."""
        return False

    def maybe_miscompare(
        self,
        comparison_func: Callable[[Any, Any], float],
        initial_result: Any,
        result: Any,
        state: RerunState,
    ) -> float:
        """Distance of two results, as ``comparison_func`` finds it."""
        return comparison_func(initial_result, result)

    def state_dict(self) -> dict[str, Any]:
        """Rate and kind, in plain types."""
        return {
            "error_injection_rate": self.error_injection_rate,
            "error_injection_type": self.error_injection_type.value,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` returned."""
        self.__init__(state_dict["error_injection_rate"], state_dict["error_injection_type"])


def destroy_rerun_state_machine() -> None:
    """Drops this process's machine."""
    global _GLOBAL_RERUN_STATE_MACHINE
    _GLOBAL_RERUN_STATE_MACHINE = None
