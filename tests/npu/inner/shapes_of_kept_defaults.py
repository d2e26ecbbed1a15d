"""Level 1 for points without a replacement: their defaults must not fall back to the CPU unnoticed.

Each runs on a fake NPU; every operation that reaches the device must have a kernel of torch_npu's own.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core import overrides
from megatron_npu.kept_defaults import KEPT_DEFAULTS

# torch_npu's own kernel, or an operation that is made of others on any device.
KEYS = (
    "PrivateUse1",
    "CompositeImplicitAutograd",
    "CompositeExplicitAutograd",
    "CompositeExplicitAutogradNonFunctional",
)


class KernelsOnly(TorchDispatchMode):
    """Collects operations that torch_npu has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.missing: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("aten::"):  # not prim::device, a question
            self.seen.add(name)
            if not any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in KEYS):
                self.missing.add(name)
        return func(*args, **kwargs or {})


def half(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="npu:0", requires_grad=True)


def fp32(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="npu:0")


def ids(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int64, device="npu:0")


CALLS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "dropout": lambda f: f(half(4, 2, 8), 0.1),
    "embedding_lookup": lambda f: f(ids(2, 4), half(50, 8)),
    "bias_dropout_add": lambda f: f(half(4, 2, 8), half(8), half(4, 2, 8), 0.1, True),
    "layer_norm": lambda f: f(half(4, 2, 8), half(8), half(8), 1e-5),
    "accumulate_weight_gradient": lambda f: f(fp32(6, 8), half(4, 6).detach(), half(4, 8).detach()),
    "count_zeros": lambda f: f([fp32(5), fp32(2, 3)]),
    "l2_norm": lambda f: f([fp32(5), fp32(2, 3)]),
    "scale_gradients": lambda f: f([fp32(5), fp32(2, 3)], 0.5),
}


@pytest.mark.parametrize("path", KEPT_DEFAULTS)
def test_the_device_has_every_kernel(path: str) -> None:
    with FakeTensorMode(), KernelsOnly() as kernels:
        result = CALLS[path.rpartition(".")[2]](overrides.default_of(path))
        if isinstance(result, torch.Tensor) and result.requires_grad:
            result.sum().backward()
    assert kernels.seen
    assert not kernels.missing


def test_the_check_sees_a_missing_kernel() -> None:
    with FakeTensorMode(), KernelsOnly() as kernels:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*(fp32(1, 1, 4, 8) for _ in range(3)))
    assert kernels.missing == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
