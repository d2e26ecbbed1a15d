"""Facts about the NPU in use and the operators that torch_npu has for it.

Chips are told apart by torch_npu's SoC number, never by name: "Ascend910B" without a digit is a first
generation part, 910B1 and later are not.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

# torch_npu.npu.get_soc_version(): 910A family 100..104, 310P 200.., 910B1.. 220.., 310B 240..,
# 910_93 250.., 950 260
_FIRST_910B = 220
_FIRST_310B = 240
_FIRST_910_93 = 250
_FIRST_950 = 260


@dataclass(frozen=True)
class Chips:
    """Chips that an operator exists for.

    Attributes:
        label: as it stands in tables.
        include: whether a SoC number belongs to them.
    """

    label: str
    include: Callable[[int], bool]


ALL = Chips("all", lambda soc: True)
FROM_910B_TO_910_93 = Chips(
    "910B, 910_93", lambda soc: _FIRST_910B <= soc < _FIRST_310B or _FIRST_910_93 <= soc < _FIRST_950
)
FROM_910B = Chips("910B, 910_93, 950", lambda soc: _FIRST_910B <= soc < _FIRST_310B or soc >= _FIRST_910_93)


@functools.cache
def soc_number() -> int:
    """Number of the SoC of the current device."""
    import torch_npu  # pyright: ignore[reportMissingImports]

    return int(torch_npu.npu.get_soc_version())


def is_first_generation() -> bool:
    """True for the 910A family and 310P: no bf16, older kernels."""
    return soc_number() < _FIRST_910B


def is_910_93() -> bool:
    """True for 910_93, whose chips are linked in other ways than those of a 910B."""
    return _FIRST_910_93 <= soc_number() < _FIRST_950


@functools.cache
def saturates() -> bool:
    """True if overflow gives the largest finite number instead of Inf, so that only a flag tells of it.

    The only mode of a 910A; later chips have it when asked for by environment variables.
    """
    import torch_npu  # pyright: ignore[reportMissingImports]

    return not torch_npu.npu.utils.is_support_inf_nan()


def has_operator(name: str, *arguments: str) -> bool:
    """Whether torch_npu is loaded and has the operator, with these arguments in its schema."""
    packet = getattr(torch.ops.npu, name, None)
    if packet is None:
        return False
    for overload in packet.overloads():
        known = {argument.name for argument in getattr(packet, overload)._schema.arguments}
        if known.issuperset(arguments):
            return True
    return False
