"""From declared replacements to active ones."""

import functools
import importlib
import pkgutil
from dataclasses import dataclass

import torch

from megatron.core import overrides
from megatron_npu import chip, versions
from megatron_npu.kept_defaults import KEPT_DEFAULTS
from megatron_npu.registry import Replacement, replacements


@functools.cache
def declare_all() -> None:
    """Imports every module of replacements."""
    package = importlib.import_module("megatron_npu.core")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)


def activate_all() -> None:
    """Registers every replacement that can be used here.

    Raises:
        ConfigError: torch_npu cannot be loaded, or versions do not fit each other.
    """
    versions.require_torch_npu()
    declare_all()
    for path, replacement in replacements().items():
        if replacement.why_not_here() is None:
            overrides.override(path)(_guarded(path))


@functools.cache
def _guarded(path: str):
    return replacements()[path].guarded()


@dataclass(frozen=True)
class Row:
    """A line of the table: a replaceable function and what serves it here."""

    point: str
    serves: str
    operators: str
    chips: str
    active: bool
    reason: str


def table() -> list[Row]:
    """Every replaceable function, replaced or not, with the reason."""
    overrides.import_all_points()
    declare_all()
    declared = replacements()
    return [_row(status, declared.get(status.path)) for status in overrides.table()]


def _row(status: overrides.PointStatus, replacement: Replacement | None) -> Row:
    point = status.path.removeprefix("megatron.core.")
    if replacement is None:
        reason = KEPT_DEFAULTS.get(status.path, "no replacement")
        return Row(point, "default", "-", "-", False, reason)
    operators = ", ".join(replacement.operators)
    if status.active:
        reason = "active"
        if replacement.limits:
            reason += f"; default for {replacement.limits}"
        served = replacement.served_by_default
        if served:
            reason += f" ({sum(served.values())} calls so far)"
    elif status.replacement is not None:
        reason = status.reason
    else:
        reason = _why_inactive(replacement)
    serves = replacement.function.__module__.removeprefix("megatron_npu.")
    return Row(point, serves, operators, replacement.chips.label, status.active, reason)


def _why_inactive(replacement: Replacement) -> str:
    problem = versions.torch_npu_problem()
    if problem is not None:
        return problem.partition(":")[0]
    if not torch.npu.is_available():  # pyright: ignore[reportAttributeAccessIssue]
        return "torch_npu finds no device"
    return replacement.why_not_here() or "not activated"


def device_line() -> str:
    """What the table is about: the chip and versions, or why there is none."""
    problem = versions.torch_npu_problem()
    if problem is not None:
        return f"no NPU in use: {problem}"
    if not torch.npu.is_available():  # pyright: ignore[reportAttributeAccessIssue]
        return f"no NPU in use: torch_npu {versions.torch_npu_version()} finds no device"
    mode = "saturation" if chip.saturates() else "INF/NAN"
    found = {
        "torch": torch.__version__,
        "torch_npu": versions.torch_npu_version(),
        "CANN": versions.cann_version(),
        "driver": versions.driver_version(),
    }
    npu = torch.npu  # pyright: ignore[reportAttributeAccessIssue]
    return (
        f"{npu.get_device_name(0)} x {npu.device_count()}, SoC {chip.soc_number()}, {mode} mode; "
        + ", ".join(f"{name} {version or 'unknown'}" for name, version in found.items())
    )
