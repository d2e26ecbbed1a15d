"""The device this process computes on: the only module that knows which kind it is.

Built on ``torch.accelerator`` and ``torch.get_device_module``, so a back end that registers itself with torch
(Ascend's ``torch_npu``, XPU, ...) needs no line here. Everything works without any accelerator: the CPU is
then the device, its generator the device generator, the process's memory the device memory.

``MEGATRON_DEVICE=cpu`` forces the CPU on a machine that has an accelerator.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from megatron.core import device_backends  # before torch

# isort: split
import torch

from megatron.core.errors import ConfigError

CPU = "cpu"
# Names that mean "the collectives of this machine's own device" on a command line.
_NATIVE_BACKEND_NAMES = frozenset({"nccl", "hccl", "xccl", "cncl", "auto", "default"})


def device_type() -> str:
    """Kind of device in use: ``"cpu"``, ``"cuda"``, ``"npu"``, ... (``MEGATRON_DEVICE`` overrides).

    Raises:
        ConfigError: ``MEGATRON_DEVICE`` names a device that this machine or this torch does not have, or
            the software of the only device does not work.
    """
    return _detect_device_type(os.environ.get("MEGATRON_DEVICE", "").strip().lower())


@functools.cache
def _detect_device_type(requested: str) -> str:
    # In this order: torch 2.6 raises an error where it is asked for a device that is not there.
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    present = CPU if found is None else found.type
    if present == CPU != requested and device_backends.PROBLEMS:
        problems = "; ".join(device_backends.PROBLEMS.values())
        raise ConfigError(f"{problems}. MEGATRON_DEVICE={CPU} goes on without it")
    if requested and requested not in (CPU, present):
        raise ConfigError(
            f"MEGATRON_DEVICE={requested}: this machine offers {present!r} to torch {torch.__version__}; "
            f"unset MEGATRON_DEVICE, or set it to {CPU}{'' if present == CPU else ' or ' + present}"
        )
    return requested or present


def is_accelerated() -> bool:
    """True when the device is not the CPU."""
    return device_type() != CPU


def _module() -> ModuleType:
    return torch.get_device_module(device_type())


def current_device() -> torch.device:
    """Device on which this process allocates: ``cpu``, or the accelerator with its index."""
    if not is_accelerated():
        return torch.device(CPU)
    return torch.device(device_type(), torch.accelerator.current_device_index())


def set_device(local_rank: int) -> torch.device:
    """Binds this process to accelerator number ``local_rank`` of this machine; no effect on a CPU.

    Raises:
        ConfigError: the machine has fewer accelerators.
    """
    if is_accelerated():
        count = device_count()
        if not 0 <= local_rank < count:
            raise ConfigError(
                f"local rank {local_rank} asks for device {device_type()}:{local_rank}, but {count} "
                "are visible; "
                f"start at most {count} processes on this machine"
            )
        torch.accelerator.set_device_index(local_rank)
    return current_device()


def device_count() -> int:
    """Number of visible accelerators; 1 on a CPU."""
    return torch.accelerator.device_count() if is_accelerated() else 1


def device_name() -> str:
    """Marketing name of the device, or of the processor on a CPU."""
    if is_accelerated():
        return str(_module().get_device_name())
    return _processor_name()


@functools.cache
def _processor_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronize() -> None:
    """Waits for all work queued on the device."""
    if is_accelerated():
        torch.accelerator.synchronize()


def empty_cache() -> None:
    """Gives cached device memory back to the driver."""
    if is_accelerated():
        torch.accelerator.empty_cache()


def collective_backend(requested: str | None = None) -> str:
    """Name of the ``torch.distributed`` backend to use where ``requested`` was asked for.

    ``None`` and the vendors' names (``nccl``, ``hccl``, ...) mean "this machine's own": a launch line
    written for one device runs on another. Any other name (``gloo``, ``ucc``, ``mpi``, ``fake``) is taken
    literally.
    """
    if requested is None or requested.lower() in _NATIVE_BACKEND_NAMES:
        return torch.distributed.get_default_backend_for_device(device_type())
    return requested.lower()


def world_backend(requested: str | None = None, carries_host_tensors: bool = True) -> str:
    """Backend for the group of all ranks: :func:`collective_backend`, and gloo beside it for host memory.

    What ranks tell each other (errors, signals, objects) then needs no queue and no memory of the device.

    Args:
        requested: as for :func:`collective_backend`.
        carries_host_tensors: False leaves gloo out, for worlds in which it may not connect.
    """
    backend = collective_backend(requested)
    native = torch.distributed.get_default_backend_for_device(device_type())
    if not is_accelerated() or backend != native or not carries_host_tensors:
        return backend
    return f"{CPU}:gloo,{device_type()}:{backend}"


def companion(name: str) -> Callable[..., Any] | None:
    """Function ``name`` of the package ``megatron_<device type>``; None without package or function.

    It is how a device's package offers what is no replacement of a function: its own profiler, options of
    its communicators.
    """
    package = f"megatron_{device_type()}"
    if importlib.util.find_spec(package) is None:
        return None
    return getattr(importlib.import_module(package), name, None)


def architecture() -> tuple[int, int]:
    """Numbers of the device's architecture as its driver counts them, (9, 0) for a Hopper GPU.

    (0, 0) where devices have no such numbers: on a CPU and on Ascend NPUs.
    """
    module = _module() if is_accelerated() else None
    numbers = getattr(module, "get_device_capability", lambda: None)()
    return (0, 0) if numbers is None else (numbers[0], numbers[1])


# --- random numbers ---------------------------------------------------------------------------------------


def manual_seed(seed: int) -> None:
    """Seeds the device's default generator, and no other (the CPU's own, when the CPU is the device)."""
    if is_accelerated():
        _module().manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def get_rng_state() -> torch.Tensor:
    """State of the device's default generator, as a CPU uint8 tensor."""
    return _module().get_rng_state() if is_accelerated() else torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Puts back what :func:`get_rng_state` returned."""
    if is_accelerated():
        _module().set_rng_state(state)
    else:
        torch.set_rng_state(state)


# --- memory -----------------------------------------------------------------------------------------------


def memory_report() -> dict[str, int]:
    """Memory in bytes: ``allocated``, ``max_allocated``, ``reserved``, ``max_reserved``.

    On a CPU "allocated" and "reserved" are both the resident set of this process, and the maxima its peak.
    """
    if is_accelerated():
        return {
            "allocated": torch.accelerator.memory_allocated(),
            "max_allocated": torch.accelerator.max_memory_allocated(),
            "reserved": torch.accelerator.memory_reserved(),
            "max_reserved": torch.accelerator.max_memory_reserved(),
        }
    resident, peak = _process_memory_bytes()
    return {"allocated": resident, "max_allocated": peak, "reserved": resident, "max_reserved": peak}


def total_memory() -> int:
    """Bytes of memory of the current device; 0 for a CPU, whose memory is the host's, or if it is unknown."""
    properties = getattr(_module(), "get_device_properties", None) if is_accelerated() else None
    return int(getattr(properties(current_device()), "total_memory", 0)) if properties else 0


def memory_stats() -> dict[str, Any]:
    """The allocator's own counters (``torch.cuda.memory_stats`` names); empty on a CPU."""
    return dict(torch.accelerator.memory_stats()) if is_accelerated() else {}


def reset_peak_memory() -> None:
    """Starts the maxima of :func:`memory_report` afresh; the peak of a CPU process cannot be reset."""
    if is_accelerated():
        torch.accelerator.reset_peak_memory_stats()


def _process_memory_bytes() -> tuple[int, int]:
    """(resident now, resident peak) of this process."""
    try:
        import resource
    except ImportError:  # Windows
        return 0, 0
    # ru_maxrss counts KiB on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        with open("/proc/self/statm", encoding="ascii") as statm:
            resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        resident = peak
    return resident, max(peak, resident)


# --- streams and events -----------------------------------------------------------------------------------


class _HostEvent:
    """Stand-in for a device event where work is synchronous: its time is the host's."""

    def __init__(self) -> None:
        self._time_s = 0.0

    def record(self, stream: object = None) -> None:
        self._time_s = time.perf_counter()

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for: the work before :meth:`record` has been done."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def elapsed_time(self, end: "_HostEvent") -> float:
        """Milliseconds from this event to ``end``."""
        return (end._time_s - self._time_s) * 1e3


def new_event(enable_timing: bool = False) -> Any:
    """An event with ``record``, ``wait``, ``query``, ``synchronize`` and ``elapsed_time`` (ms)."""
    return torch.Event(device_type(), enable_timing=enable_timing) if is_accelerated() else _HostEvent()


def new_stream() -> torch.Stream | None:
    """A new stream of this device; None on a CPU, whose work is synchronous."""
    return torch.Stream(device=current_device()) if is_accelerated() else None


def current_stream() -> torch.Stream | None:
    """The stream that work is queued on; None on a CPU."""
    return torch.accelerator.current_stream() if is_accelerated() else None


def use_stream(stream: torch.Stream | None) -> contextlib.AbstractContextManager[Any]:
    """Context in which work is queued on ``stream`` (no effect for None)."""
    return contextlib.nullcontext() if stream is None else stream


# --- what the device is good at ---------------------------------------------------------------------------


@functools.cache
def _cpu_matmul_dtypes() -> dict[torch.dtype, torch.dtype]:
    """Which half precisions this processor multiplies without a detour over fp32 at element speed.

    Without native support torch's fp16 GEMM is a naive loop: measured on an AVX-512 server core, 29 GFLOP/s
    forward and 7 for the weight gradient against 180 in fp32 (bf16, with AVX512_BF16: 400).
    """
    supported = {
        torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
        torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    }
    return {dtype: torch.float32 for dtype, native in supported.items() if not native}


def matmul_compute_dtype(dtype: torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """Type in which matrix products and attention of ``dtype`` operands should be computed.

    The same type wherever the device multiplies it natively; fp32 for a half precision that this CPU lacks.
    Results are returned in ``dtype`` by the caller, rounded once.

    Args:
        dtype: type of the operands.
        device: where they are; default the device of this process.
    """
    on_cpu = device.type == CPU if device is not None else not is_accelerated()
    return _cpu_matmul_dtypes().get(dtype, dtype) if on_cpu else dtype


def supports_bf16() -> bool:
    """Whether the device computes in bf16, be it slowly, as a CPU does."""
    answers = getattr(_module(), "is_bf16_supported", None) if is_accelerated() else None
    return answers is None or bool(answers())


def draws_in_parallel(device: torch.device) -> bool:
    """True where a tensor of random numbers is drawn in parallel; a CPU draws one after the other."""
    return device.type != CPU


def build_device(config: Any) -> torch.device:
    """Where a model's parameters are made, by its config: on meta, on the CPU, or on the current device."""
    if config.init_model_with_meta_device:
        return torch.device("meta")
    return torch.device(CPU) if config.use_cpu_initialization else current_device()


def block_elements(device: torch.device) -> int:
    """How many elements a chain of elementwise operations should take at a time.

    On a CPU a block of fp32 (512 KiB) stays in a core's cache from one operation to the next; elsewhere
    launching a kernel costs more than re-reading memory, so blocks only bound what is held in fp32.
    """
    return 1 << 17 if device.type == CPU else 1 << 26


def row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Cuts the rows of a matrix into slices of at most :func:`block_elements` elements, one row at least."""
    step = max(1, block_elements(device) // max(columns, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
