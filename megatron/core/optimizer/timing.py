"""Named timers around what is done to the gradients, and around the parts of an optimizer step."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron.core.optimizer.optimizer_config import OptimizerConfig

if TYPE_CHECKING:
    from megatron.core.model_parallel_config import ModelParallelConfig


@contextlib.contextmanager
def timed(config: "OptimizerConfig | ModelParallelConfig", name: str) -> Iterator[None]:
    """Times the block under ``name`` (level 1) if the configuration carries timers."""
    if config.timers is None:
        yield
        return
    timer = config.timers(name, log_level=1)
    timer.start(barrier=config.barrier_with_L1_time)
    yield
    timer.stop()
