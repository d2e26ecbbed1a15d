"""How many micro-batches make up a step, fixed or growing with the samples seen."""

import logging
from abc import ABC, abstractmethod

from megatron.core.errors import UsageError

logger = logging.getLogger(__name__)

_GLOBAL_NUM_MICROBATCHES_CALCULATOR: "NumMicroBatchesCalculator | None" = None


def _calculator() -> "NumMicroBatchesCalculator":
    if _GLOBAL_NUM_MICROBATCHES_CALCULATOR is None:
        raise UsageError("the batch size is not set up yet: call init_num_microbatches_calculator() first")
    return _GLOBAL_NUM_MICROBATCHES_CALCULATOR


def get_num_microbatches() -> int:
    """Micro-batches per step, on each data-parallel rank."""
    return _calculator().get()


def get_current_global_batch_size() -> int:
    """Samples per step over all ranks, as asked for."""
    return _calculator().get_current_global_batch_size()


def get_current_running_global_batch_size() -> int:
    """Samples per step over all ranks, as run: rounded down to whole micro-batches where that is allowed."""
    return _calculator().get_current_running_global_batch_size()


def update_num_microbatches(
    consumed_samples: int, consistency_check: bool = True, verbose: bool = False
) -> None:
    """Moves a growing batch size to its value after ``consumed_samples``.

    Raises:
        UsageError: with ``consistency_check``, a size that does not divide into whole micro-batches.
    """
    _calculator().update(consumed_samples, consistency_check, verbose)


def init_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: list[int] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool = False,
) -> None:
    """Sets up the batch size of this process, once. Arguments as for the calculators.

    Raises:
        UsageError: it is set up already, or the sizes do not fit together.
    """
    _configure_global_num_microbatches_calculator(
        rank,
        rampup_batch_size,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
        init=True,
    )


def unset_num_microbatches_calculator() -> None:
    """Forgets the batch size of this process."""
    global _GLOBAL_NUM_MICROBATCHES_CALCULATOR
    _GLOBAL_NUM_MICROBATCHES_CALCULATOR = None


def destroy_num_microbatches_calculator() -> None:
    """Forgets the batch size of this process."""
    unset_num_microbatches_calculator()


def _configure_global_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: list[int] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool = False,
    init: bool = False,
) -> None:
    """``init``: nothing may have been set up yet."""
    global _GLOBAL_NUM_MICROBATCHES_CALCULATOR
    if init and _GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
        raise UsageError(
            "the batch size is set up already: call reconfigure_num_microbatches_calculator() instead"
        )
    _GLOBAL_NUM_MICROBATCHES_CALCULATOR = _build_num_microbatches_calculator(
        rank,
        rampup_batch_size,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
    )


def _build_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: list[int] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool,
) -> "ConstantNumMicroBatchesCalculator | RampupBatchsizeNumMicroBatchesCalculator":
    """A calculator for a fixed size, or for the ramp [start, increment, samples]."""
    sizes = (global_batch_size, micro_batch_size, data_parallel_size, decrease_batch_size_if_needed, rank)
    if rampup_batch_size is None:
        calculator = ConstantNumMicroBatchesCalculator(*sizes)
        if rank == 0:
            logger.info("micro-batches per step: %d (constant)", calculator.get())
        return calculator
    if len(rampup_batch_size) != 3:
        raise UsageError(
            f"rampup_batch_size {' '.join(map(str, rampup_batch_size))}: {len(rampup_batch_size)} numbers "
            "where three are needed (start size, increment, samples), for example 32 32 100000"
        )
    start, increment, samples = map(int, rampup_batch_size)
    if rank == 0:
        logger.info(
            "the global batch size grows from %d to %d in steps of %d over the first %d samples",
            start,
            global_batch_size,
            increment,
            samples,
        )
    return RampupBatchsizeNumMicroBatchesCalculator(*sizes, start, increment, samples)


class NumMicroBatchesCalculator(ABC):
    """Batch sizes of the moment.

    Attributes:
        current_global_batch_size: samples per step over all ranks, as asked for.
        current_running_global_batch_size: the same as run, in whole micro-batches.
        num_micro_batches: of a step, on each data-parallel rank.
    """

    def __init__(self) -> None:
        self.micro_batch_size = 0
        self.current_global_batch_size = 0
        self.current_running_global_batch_size = 0
        self.num_micro_batches = 0

    def _set_unit(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int,
        decrease_batch_size_if_needed: bool,
        rank: int,
    ):
        """Takes the batch sizes that every calculator has.

        Args:
            global_batch_size: samples per step over all ranks.
            micro_batch_size: samples per micro-batch.
            data_parallel_size: ranks that split a step.
            decrease_batch_size_if_needed: round down to whole micro-batches instead of refusing.
            rank: of this process; rank 0 logs.
        """
        sizes = {
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
            "data-parallel size": data_parallel_size,
        }
        problems = [f"{name} {size} must be 1 or more" for name, size in sizes.items() if size < 1]
        if problems:
            raise UsageError("; ".join(problems))
        self.rank = rank
        self.micro_batch_size = micro_batch_size
        self.data_parallel_size = data_parallel_size
        self.micro_batch_times_data_parallel_size = micro_batch_size * data_parallel_size
        self.decrease_batch_size_if_needed = decrease_batch_size_if_needed

    def get(self) -> int:
        """Micro-batches per step, on each data-parallel rank."""
        return self.num_micro_batches

    def get_current_global_batch_size(self) -> int:
        """Samples per step over all ranks, as asked for."""
        return self.current_global_batch_size

    def get_micro_batch_size(self) -> int:
        """Samples per micro-batch."""
        return self.micro_batch_size

    def get_current_running_global_batch_size(self) -> int:
        """Samples per step over all ranks, as run."""
        return self.current_running_global_batch_size

    @abstractmethod
    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Moves to the sizes in force after ``consumed_samples``."""

    def _set_global_batch_size(self, size: int, consistency_check: bool) -> None:
        unit = self.micro_batch_times_data_parallel_size
        fits = size >= unit and (size % unit == 0 or self.decrease_batch_size_if_needed)
        if consistency_check and not fits:
            raise UsageError(_explain_misfit(size, self.micro_batch_size, self.data_parallel_size))
        self.current_global_batch_size = size
        self.num_micro_batches = size // unit
        self.current_running_global_batch_size = self.num_micro_batches * unit
        if self.rank == 0 and self.current_running_global_batch_size != size and consistency_check:
            logger.info("global batch size %d is run as %d", size, self.current_running_global_batch_size)


class ConstantNumMicroBatchesCalculator(NumMicroBatchesCalculator):
    """A fixed batch size.

    Raises:
        UsageError: a size that does not divide into whole micro-batches.
    """

    def __init__(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int,
        decrease_batch_size_if_needed: bool,
        rank: int,
    ):
        super().__init__()
        self._set_unit(
            global_batch_size, micro_batch_size, data_parallel_size, decrease_batch_size_if_needed, rank
        )
        self._set_global_batch_size(global_batch_size, consistency_check=True)

    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        """Nothing changes."""


class RampupBatchsizeNumMicroBatchesCalculator(NumMicroBatchesCalculator):
    """A batch size that grows in equal steps from ``start_global_batch_size`` over the first
    ``ramup_samples`` samples.

    (``ramup_samples`` is spelled so in the public interface.)

    Raises:
        UsageError: a ramp that does not end at the global batch size.
    """

    def __init__(
        self,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_size: int,
        decrease_batch_size_if_needed: bool,
        rank: int,
        start_global_batch_size: int,
        batch_size_increment: int,
        ramup_samples: int,
    ):
        super().__init__()
        self._set_unit(
            global_batch_size, micro_batch_size, data_parallel_size, decrease_batch_size_if_needed, rank
        )
        _check_ramp(global_batch_size, start_global_batch_size, batch_size_increment, ramup_samples)
        self.global_batch_size = global_batch_size
        self.start_global_batch_size = start_global_batch_size
        self.batch_size_increment = batch_size_increment
        self.ramup_samples = ramup_samples
        self.update(0, consistency_check=False)
        if rank == 0:
            logger.info("setting initial batch size to %d", self.current_global_batch_size)

    def update(self, consumed_samples: int, consistency_check: bool, verbose: bool = False) -> None:
        size = self._size_after(consumed_samples)
        if verbose and self.rank == 0 and size != self.current_global_batch_size:
            logger.info("ramping up batch size from %d to %d", self.current_global_batch_size, size)
        self._set_global_batch_size(size, consistency_check)

    def _size_after(self, consumed_samples: int) -> int:
        rises = (self.global_batch_size - self.start_global_batch_size) // self.batch_size_increment
        if consumed_samples > self.ramup_samples or rises == 0 or self.ramup_samples == 0:
            return self.global_batch_size
        samples_per_rise = self.ramup_samples / rises
        size = (
            self.start_global_batch_size
            + int(consumed_samples / samples_per_rise) * self.batch_size_increment
        )
        return min(size, self.global_batch_size)


def _check_ramp(global_batch_size: int, start: int, increment: int, samples: int) -> None:
    problems = []
    if start < 1 or start > global_batch_size:
        problems.append(f"the start size {start} must be between 1 and global_batch_size {global_batch_size}")
    if increment < 1:
        problems.append(f"the increment {increment} must be 1 or more")
    elif not problems and (global_batch_size - start) % increment:
        last = start + (global_batch_size - start) // increment * increment
        problems.append(
            f"increments of {increment} from {start} do not reach global_batch_size {global_batch_size} "
            f"but {last} and {last + increment}: use one of these, or an increment that divides "
            f"{global_batch_size - start}"
        )
    if samples < 0:
        problems.append(f"the ramp's length {samples} must be 0 samples or more")
    if problems:
        raise UsageError(f"rampup_batch_size {start} {increment} {samples}: " + "; ".join(problems))


def _explain_misfit(size: int, micro_batch_size: int, data_parallel_size: int) -> str:
    """Message for a global batch size that is no whole number of micro-batches, with sizes that are."""
    unit = micro_batch_size * data_parallel_size
    below = size // unit * unit
    nearest = " or ".join(str(fit) for fit in (below, below + unit) if fit > 0)
    rule = (
        f"global batch size {size} is no multiple of micro-batch size {micro_batch_size} x data-parallel "
        f"size {data_parallel_size} = {unit}: use {nearest}"
    )
    return rule if below == 0 else f"{rule}, or set decrease_batch_size_if_needed to run {below}"


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def get_micro_batch_size() -> int:
    """Samples per micro-batch."""
    return _calculator().get_micro_batch_size()


def reconfigure_num_microbatches_calculator(
    rank: int,
    rampup_batch_size: list[int] | None,
    global_batch_size: int,
    micro_batch_size: int,
    data_parallel_size: int,
    decrease_batch_size_if_needed: bool = False,
) -> None:
    """Replaces the batch size of this process. Arguments as for the calculators."""
    _configure_global_num_microbatches_calculator(
        rank,
        rampup_batch_size,
        global_batch_size,
        micro_batch_size,
        data_parallel_size,
        decrease_batch_size_if_needed,
    )
