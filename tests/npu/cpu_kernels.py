"""The virtual NPU's kernels under torch_npu's schemas, for CPU tensors, as tests of level 2 need them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import library as torch_library

from megatron_npu.virtual.kernels import all_kernels, matmul_collectives

_KEPT: list[torch_library.Library] = []


def install_on_cpu() -> None:
    """Lets CPU tensors go through torch_npu's operators and its own derivative formulas.

    The formulas are registered for NPU tensors only. A key set keeps back ends and functionality apart, so
    below autograd such a call goes on to the NPU's kernel: that one has to be ours as well.
    """
    import torch_npu  # noqa: F401

    library = torch_library.Library("npu", "IMPL")
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


def register_gloo(group: dist.ProcessGroup) -> None:
    """Makes gloo's backend of a group the one for NPU tensors as well."""
    gloo = group._get_backend(torch.device("cpu"))
    group._register_backend(torch.device("npu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    matmul_collectives.register(gloo, group)
