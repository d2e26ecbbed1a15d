"""What ``megatron.core`` asks the package of the device in use for by name (``accelerator.companion``).

None of these functions imports torch_npu before it is called.
"""

from collections.abc import Mapping
from typing import Any


def is_wanted() -> bool:
    """Whether torch is to load torch_npu in this process; imports neither.

    True where the machine has an NPU or ``MEGATRON_DEVICE`` asks for one.

    Raises:
        ConfigError: one is wanted, and its software does not work.
    """
    from megatron_npu import versions

    return versions.is_wanted()


def activate() -> None:
    """Puts every replacement in place that this chip and this torch_npu can run.

    Raises:
        ConfigError: versions of torch, torch_npu or CANN that do not fit each other.
    """
    from megatron_npu.activation import activate_all

    activate_all()


def communicator_options(labels: tuple[str, ...], buffers_mb: Mapping[str, int]) -> Any:
    """Options of a group's communicator: see :func:`megatron_npu.communicators.options`."""
    from megatron_npu import communicators

    return communicators.options(labels, buffers_mb)


def describe_communicators(groups: list[tuple[tuple[str, ...], int]], buffers_mb: Mapping[str, int]) -> str:
    """What the communicators of a rank cost: see :func:`megatron_npu.communicators.describe`."""
    from megatron_npu import communicators

    return communicators.describe(groups, buffers_mb)


def make_profiler(directory: str, steps: int) -> Any:
    """Ascend's profiler, for ``steps`` steps; it writes ``<worker>_<time>_ascend_pt/`` into the directory.

    It sees what torch's sees of the host, and every kernel, stream and message of the NPU. Level 1 names
    kernels and collectives and says how busy the parts of a core were; the levels above and below it differ
    by what they cost. MindStudio Insight and msprof-analyze read the result.
    """
    from torch_npu import profiler  # pyright: ignore[reportMissingImports]

    return profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
        # Its end is the schedule's: stopped without one, the profiler warns of data that may be incomplete.
        schedule=profiler.schedule(wait=0, warmup=0, active=steps, repeat=1),
        record_shapes=True,
        on_trace_ready=profiler.tensorboard_trace_handler(directory),
        experimental_config=profiler._ExperimentalConfig(
            profiler_level=profiler.ProfilerLevel.Level1,
            aic_metrics=profiler.AiCMetrics.PipeUtilization,
        ),
    )
