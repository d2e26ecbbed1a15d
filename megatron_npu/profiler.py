"""Ascend's profiler: what torch's sees of the host, and every kernel, stream and message of the NPU."""

from typing import Any


def make_profiler(directory: str, steps: int) -> Any:
    """A ``torch_npu.profiler.profile`` of so many steps; it writes ``<worker>_<time>_ascend_pt/``.

    Level 1 names kernels and collectives and says how busy the parts of a core were; the levels above and
    below it differ by what they cost. MindStudio Insight and msprof-analyze read the result.
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
