"""Operators of a virtual NPU: torch's by the CPU's kernels, Ascend's own by those of ``kernels``.

Only what allocates, or changes how memory is seen, stays torch_npu's: it works on host memory.
"""

import collections
import json
import multiprocessing.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import library as torch_library

from megatron_npu.virtual.host_memory import Crossing
from megatron_npu.virtual.kernels import all_kernels
from megatron_npu.virtual.random_numbers import drawing_from, host_generator
from megatron_npu.virtual.saturation import saturated

KEY = "PrivateUse1"
# Calls of Ascend's own operators in this process, by name; written to the directory in the variable, if any.
CALLS: collections.Counter[str] = collections.Counter()
CALLS_DIRECTORY = "VIRTUAL_NPU_CALLS"

_KEPT_LIBRARIES: list[torch_library.Library] = []
_TORCH_NPU_DOES = frozenset(
    [
        "empty.memory_format",
        "empty_strided",
        "empty_like",
        "new_empty_strided",
        "as_strided_",
        "resize_",
        "resize_as_",
        "set_",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
        "is_set_to",
        "is_pinned",
        "_to_copy",
        "_pin_memory",
        "record_stream",
        "_fused_sdp_choice",
    ]
)
_NPU_DOES = frozenset(
    [
        "get_npu_format",
        "get_storage_size",
        "empty_with_format",
        "unsafe_empty_with_format",
        "npu_change_data_ptr",
        "empty_with_swapped_memory",
        "copy_memory_",
    ]
)
# Indices may lie in host memory, on a device too, and lengths of documents have to.
_TAKES_HOST_TENSORS = frozenset(["index.Tensor", "index_put", "index_put_", "_index_put_impl_"])
_TAKES_HOST_TENSORS |= {"npu_fusion_attention_v3", "npu_fusion_attention_grad_v3"}
# torch_npu answers these above its other kernels, at autograd's key, though they have no derivative.
_WITHOUT_DERIVATIVE = frozenset(["__ior__.Scalar", "__ior__.Tensor", "argsort", "one_hot", "where"])
# A device's matrix unit adds up products of half precision in fp32, and rounds once.
_PRODUCTS = frozenset(["mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "mv", "dot"])
_HALVES = ({torch.float16}, {torch.bfloat16})


def keep(library: torch_library.Library) -> None:
    """Its end would take the kernels back."""
    _KEPT_LIBRARIES.append(library)


def registered(namespace: str) -> Iterator[tuple[str, torch._ops.OpOverload]]:
    """Name and operator of everything in a namespace that torch_npu has a kernel for."""
    for qualified in sorted(torch._C._dispatch_get_registrations_for_dispatch_key(KEY)):
        home, _, name = qualified.partition("::")
        base, _, overload = name.partition(".")
        packet = getattr(getattr(torch.ops, namespace), base, None) if home == namespace else None
        if packet is not None and (overload or "default") in packet.overloads():
            yield name, getattr(packet, overload or "default")


def route_aten(library: torch_library.Library) -> None:
    """Lets torch's operators on NPU tensors run the CPU's kernels."""
    for name, operator in registered("aten"):
        if name not in _TORCH_NPU_DOES and not _is_view(operator):
            library.impl(name, _by_cpu_kernel(name, operator), KEY)
        if name in _WITHOUT_DERIVATIVE:
            library.impl(name, _by_cpu_kernel(name, operator), f"Autograd{KEY}", allow_override=True)


def route_npu() -> None:
    """Gives Ascend's operators the kernels of ``kernels``, and a clear error to the others.

    Their calls are counted. At the end of a process they go to ``calls_RANK.json`` in the directory that
    the variable VIRTUAL_NPU_CALLS names.
    """
    kernels = all_kernels()
    library = torch_library.Library("npu", "IMPL")
    keep(library)
    for name, _ in registered("npu"):
        if name in kernels:
            library.impl(name, _by_kernel(name, kernels[name]), KEY)
        elif name not in _NPU_DOES:
            library.impl(name, _missing(name), KEY)


def _count(name: str) -> None:
    if not CALLS and CALLS_DIRECTORY in os.environ:
        # Unlike atexit this also runs at the end of a process that multiprocessing forked.
        multiprocessing.util.Finalize(None, _write_calls, exitpriority=0)
    CALLS[name] += 1


def _write_calls() -> None:
    file = Path(os.environ[CALLS_DIRECTORY]) / f"calls_{os.environ.get('RANK', '0')}.json"
    file.write_text(json.dumps(dict(CALLS.most_common()), indent=1), encoding="utf-8")


def _is_view(operator: torch._ops.OpOverload) -> bool:
    aliases = [r.alias_info for r in operator._schema.returns if r.alias_info is not None]
    return any(not alias.is_write for alias in aliases)


def _by_cpu_kernel(name: str, operator: torch._ops.OpOverload) -> Callable[..., Any]:
    arguments = operator._schema.arguments
    takes_generator = any(argument.name == "generator" for argument in arguments)
    is_random = torch.Tag.nondeterministic_seeded in operator.tags
    takes_host_tensors = name in _TAKES_HOST_TENSORS
    compute = _in_fp32(operator) if name in _PRODUCTS else operator

    def kernel(*args: Any, **kwargs: Any) -> Any:
        crossing = Crossing(name, takes_host_tensors)
        args = crossing.down(args)
        kwargs = {key: crossing.down(value) for key, value in kwargs.items()}
        crossing.check()
        if takes_generator:
            kwargs |= {argument.name: value for argument, value in zip(arguments, args, strict=False)}
            kwargs["generator"], args = host_generator(kwargs.get("generator"), crossing.device), ()
        elif is_random:
            with drawing_from(host_generator(None, crossing.device)):
                return crossing.up(saturated(compute, *args, **kwargs))
        return crossing.up(saturated(compute, *args, **kwargs))

    return kernel


def _in_fp32(operator: torch._ops.OpOverload) -> Callable[..., Tensor]:
    def compute(*args: Any, **kwargs: Any) -> Tensor:
        dtypes = {value.dtype for value in args if isinstance(value, Tensor)}
        if dtypes not in _HALVES:
            return operator(*args, **kwargs)
        wide = [value.float() if isinstance(value, Tensor) else value for value in args]
        return operator(*wide, **kwargs).to(dtypes.pop())

    return compute


def _by_kernel(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        _count(name)
        crossing = Crossing(name, name in _TAKES_HOST_TENSORS)
        args = crossing.down(args)
        kwargs = {key: crossing.down(value) for key, value in kwargs.items()}
        crossing.check()
        return crossing.up(saturated(function, *args, **kwargs))

    return kernel


def _missing(name: str) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"the virtual NPU has no kernel for npu::{name}: leave out the replacement that calls it with "
            "--disable-override, or write one in megatron_npu/virtual/kernels"
        )

    return kernel
