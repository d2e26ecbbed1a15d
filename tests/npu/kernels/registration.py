"""CPU kernels for ``npu::`` operators: written from Ascend's documents, registered under the real schemas.

None calls or resembles a default of ``megatron.core.fusions``: agreement of the two says something. What the
documents leave undefined is NaN here, and what they forbid is an error, so that nothing depends on it.

A kernel computes on CPU tensors and may be handed host memory of a virtual device as such.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch

import tests.npu.kernels

KERNELS: dict[str, Callable[..., Any]] = {}
_KEPT: list[torch.library.Library] = []


def kernel(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declares the CPU kernel of ``npu::name`` (an overload as ``name.overload``)."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        KERNELS[name] = function
        return function

    return declare


def all_kernels() -> dict[str, Callable[..., Any]]:
    """Every kernel of this package by the operator's name; ``KERNELS`` holds what is imported already."""
    for module in pkgutil.iter_modules(tests.npu.kernels.__path__, "tests.npu.kernels."):
        importlib.import_module(module.name)
    return KERNELS


def install_on_cpu() -> None:
    """Lets CPU tensors go through torch_npu's operators and its own derivative formulas.

    The formulas are registered for NPU tensors only. A key set keeps back ends and functionality apart, so
    below autograd such a call goes on to the NPU's kernel: that one has to be ours as well.
    """
    import torch_npu  # noqa: F401

    library = torch.library.Library("npu", "IMPL")
    _KEPT.append(library)  # its end would take the kernels back
    formulas = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradPrivateUse1)
    for name, function in all_kernels().items():
        library.impl(name, function, "CPU")
        library.impl(name, function, "PrivateUse1", allow_override=True)
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "AutogradPrivateUse1"):
            library.impl(name, _redispatch(name, formulas), "AutogradCPU", with_keyset=True)


def _redispatch(name: str, formulas: torch._C.DispatchKeySet) -> Callable[..., Any]:
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.npu, base), overload or "default")

    def call(keys: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        return operator.redispatch(formulas | keys, *args, **kwargs)

    return call
