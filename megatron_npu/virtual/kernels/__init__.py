"""CPU kernels for ``npu::`` operators: written from Ascend's documents, registered under the real schemas.

None calls or resembles a default of ``megatron.core.fusions``: agreement of the two says something. What the
documents leave undefined is NaN here, and what they forbid is an error, so that nothing depends on it.

A kernel computes on CPU tensors and may be handed host memory of a virtual device as such.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

KERNELS: dict[str, Callable[..., Any]] = {}


def kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares the CPU kernel of ``npu::name`` (an overload as ``name.overload``)."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        KERNELS[name] = function
        return function

    return declare


def all_kernels() -> dict[str, Callable[..., Any]]:
    """Every kernel of this package by the operator's name; ``KERNELS`` holds what is imported already."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    return KERNELS
