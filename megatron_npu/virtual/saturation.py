"""Saturation mode, the only one of a 910A: no Inf and no NaN comes out of a kernel, and a flag tells of it.

Operands that are not finite before (a mask filled with -Inf) are no overflow: their calls go as on the CPU.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron_npu.virtual.kernels.optimizer import OverflowFlag


@functools.cache
def saturates() -> bool:
    """Whether the device of this process does, as torch_npu decides it from the chip and the environment."""
    return not torch.npu.utils.is_support_inf_nan()  # pyright: ignore[reportAttributeAccessIssue]


def saturated(compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``compute(*args, **kwargs)`` on CPU tensors; in saturation mode as such a device would.

    What overflows becomes the largest finite number of its type, NaN becomes 0, and the flag goes up.
    """
    if not saturates():
        return compute(*args, **kwargs)
    operands = [*_floats(args), *_floats(list(kwargs.values()))]
    was_finite = all(map(_is_finite, operands))
    result = compute(*args, **kwargs)
    if was_finite:
        for value in [*_floats(result), *operands]:  # operands too: a call may write into them
            if not _is_finite(value):
                OverflowFlag.raised = True
                if isinstance(value, Tensor):
                    value.nan_to_num_(nan=0.0)
    return result


def _floats(value: Any) -> Iterator[Tensor | float]:
    if isinstance(value, float) or (isinstance(value, Tensor) and value.is_floating_point()):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _floats(each)


def _is_finite(value: Tensor | float) -> bool:
    return bool(value.isfinite().all()) if isinstance(value, Tensor) else math.isfinite(value)
