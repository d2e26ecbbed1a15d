"""Comparing replacements with their defaults, forward and backward, in every type; fp64 is the reference."""

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import accelerator, overrides
from megatron.core.errors import MegatronError
from megatron_npu import activation, chip
from megatron_npu.checking.case import Call, Case, execute
from megatron_npu.checking.cases import CASES
from megatron_npu.registry import Replacement, replacements


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Context with one process group of all ranks of this launch, for NPU tensors and for CPU tensors.

    Without a launcher, or with one rank, there is no group.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    accelerator.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,npu:hccl")
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is rank 0, which prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


class NothingToCheckError(MegatronError):
    """No device to compare on."""

    exit_status = 2

    def __init__(self, reason: str):
        super().__init__(f"nothing to compare, {reason}")


@dataclass(frozen=True)
class Distance:
    """How far some tensors are from their references."""

    max_abs: float = 0.0
    relative: float = 0.0

    def __or__(self, other: "Distance") -> "Distance":
        """The larger of both values."""
        return Distance(max(self.max_abs, other.max_abs), max(self.relative, other.relative))


@dataclass(frozen=True)
class Finding:
    """A line of the error table."""

    case: Case
    dtype: torch.dtype
    forward: Distance
    backward: Distance | None
    default: Distance
    bound: float
    failure: str = ""

    @property
    def good(self) -> bool:
        worst = max(self.forward.relative, self.backward.relative if self.backward else 0.0)
        return not self.failure and worst <= self.bound


def distance(found: Tensor, wanted: Tensor) -> Distance:
    """Largest difference, and relative L2 norm of all; NaN counts as infinitely far.

    Raises:
        ValueError: another shape.
    """
    if found.shape != wanted.shape:
        raise ValueError(f"shape {tuple(found.shape)} where the default gives {tuple(wanted.shape)}")
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    difference = (found - wanted).abs()
    if not wanted.numel():
        return Distance()
    if not bool(torch.isfinite(difference).all()):
        return Distance(math.inf, math.inf)
    error, scale = (float(torch.linalg.vector_norm(t)) for t in (difference, wanted))
    return Distance(float(difference.max()), error / scale if scale else error)


def judge(replacement: Replacement, case: Case, dtype: torch.dtype, device: torch.device) -> Finding:
    """Runs one case in one type."""
    default = overrides.default_of(case.path)
    reference = execute(default, case, case.reference_call(dtype))
    bound = replacement.bound[dtype]
    try:
        forward, backward = _distances(replacement.function, case, case.call(dtype, device), reference)
    except Exception as error:  # a kernel may fail in any way; the others still want to be checked
        failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        return Finding(case, dtype, Distance(), None, Distance(), bound, failure)
    own_forward, own_backward = _distances(default, case, case.call(dtype, device), reference)
    own = own_forward | (own_backward or Distance())
    return Finding(case, dtype, forward, backward, own, bound)


def _distances(
    function: Callable[..., Any], case: Case, call: Call, reference: tuple[list[Tensor], list[Tensor]]
) -> tuple[Distance, Distance | None]:
    found = execute(function, case, call)
    forward, backward = (
        [distance(f, w) for f, w in zip(some, wanted, strict=True)]
        for some, wanted in zip(found, reference, strict=True)
    )
    return _worst(forward), _worst(backward) if backward else None


def _worst(distances: Iterable[Distance]) -> Distance:
    worst = Distance()
    for one in distances:
        worst = worst | one
    return worst


def findings(
    device: torch.device,
    points: list[str] | None = None,
    dtypes: list[str] | None = None,
    everywhere: bool = False,
) -> Iterator[Finding]:
    """Every case of every replacement that this chip can run.

    Args:
        device: where to run them.
        points: names of points to keep; None for all.
        dtypes: types to keep.
        everywhere: also those that this chip or its mode has no use for.
    """
    activation.declare_all()
    half = () if chip.is_first_generation() else (torch.bfloat16,)
    present = [t for t in (torch.float32, torch.float16, *half) if not dtypes or str(t)[6:] in dtypes]
    for path, replacement in replacements().items():
        if points and replacement.name not in points:
            continue
        if not everywhere and replacement.why_not_here() is not None:
            continue
        for case in (case for case in CASES if case.path == path and _has_its_ranks(case)):
            for dtype in (t for t in present if t in (case.dtypes or replacement.dtypes)):
                call = case.call(dtype, "cpu")
                if replacement.why_not_now(call.args, call.kwargs) is None:
                    yield judge(replacement, case, dtype, device)


def _has_its_ranks(case: Case) -> bool:
    return dist.is_initialized() or not case.among_ranks


def _left_out() -> str:
    """Notes on cases that this process cannot compare alone, and how to compare them."""
    names = sorted({case.path.rpartition(".")[2] for case in CASES if not _has_its_ranks(case)})
    command = "torchrun --nproc-per-node 2 -m megatron_npu check"
    return f"compared by several ranks only ({command}): {', '.join(names)}" if names else ""


def _why_none(points: list[str] | None, dtypes: list[str] | None) -> str:
    if dtypes == ["bfloat16"] and chip.is_first_generation():
        return "this chip has no bfloat16: leave out --dtype, or ask for float16 or float32"
    named = f" named {' or '.join(points)}" if points else ""
    return f"no replacement{named} can run here" + (f" in {' or '.join(dtypes)}" if dtypes else "")


def main(device: torch.device, points: list[str] | None, dtypes: list[str] | None) -> int:
    """Prints the table; 1 if an error is beyond its bound, else 0.

    Of several ranks the first prints its own table, and the others the lines of errors beyond their bounds.

    Raises:
        NothingToCheckError: no case is left.
    """
    if is_first():
        print(activation.device_line())
        print(_line("point", "case", "dtype", ("max abs", "rel L2", "grad L2", "default", "bound"), ""))
    count = bad = 0
    for finding in findings(device, points, dtypes):
        count, bad = count + 1, bad + (not finding.good)
        backward = f"{finding.backward.relative:.1e}" if finding.backward else "-"
        numbers = (
            f"{finding.forward.max_abs:.1e}", f"{finding.forward.relative:.1e}", backward,
            f"{finding.default.relative:.1e}", f"{finding.bound:.1e}",
        )  # fmt: skip
        verdict = "ok" if finding.good else f"BEYOND THE BOUND {finding.failure}".rstrip()
        name = finding.case.path.rpartition(".")[2]
        if is_first() or not finding.good:
            print(_line(name, finding.case.name, str(finding.dtype)[6:], numbers, verdict), flush=True)
    if not count:
        raise NothingToCheckError("; ".join(filter(None, (_why_none(points, dtypes), _left_out()))))
    if is_first():
        print(f"{count - bad} of {count} comparisons within their bounds")
        if _left_out():
            print(_left_out())
    return 1 if bad else 0


def _line(point: str, case: str, dtype: str, numbers: tuple[str, ...], verdict: str) -> str:
    return f"{point:36}{case:37}{dtype:10}" + "".join(f"{number:>9}" for number in numbers) + f"  {verdict}"
