"""What this package can replace, and when.

A replacement is declared with the operators it calls and the chips, types and shapes they take:

    @replaces("megatron.core.fusions.fused_layer_norm.rms_norm", operators=("npu_rms_norm",), since="5.0.0")
    def rms_norm(x, weight, eps): ...

Declaring does nothing; ``activation.activate_all`` registers what the chip in use can run. A call that a
declared limit excludes goes to the default, which is correct everywhere; the reason is logged once and
counted for the table.
"""

import collections
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from megatron.core import overrides
from megatron_npu import chip, versions

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Replacement:
    """A function of this package that can stand in for one of ``megatron.core``.

    Attributes:
        path: dotted name of the point.
        function: the replacement.
        operators: names in ``torch.ops.npu`` that it calls.
        since: release of Ascend's operator library that has them all.
        chips: chips that have them.
        dtypes: types of the first tensor that they take.
        only_if: None if the device in use wants this replacement, else why not.
        unless: called with a call's arguments; None, or why the default has to serve this call.
        limits: ``unless`` in words.
        bound: largest relative L2 error against float64, by type.
        note: what else a reader of the table should know.
        served_by_default: calls that went to the default, by reason.
    """

    path: str
    function: Callable[..., Any]
    operators: tuple[str, ...]
    since: str
    chips: chip.Chips = chip.ALL
    dtypes: tuple[torch.dtype, ...] = FLOATS
    only_if: Callable[[], str | None] | None = None
    unless: Callable[..., str | None] | None = None
    limits: str = ""
    bound: dict[torch.dtype, float] = field(default_factory=dict)
    note: str = ""
    served_by_default: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rpartition(".")[2]

    def why_not_here(self) -> str | None:
        """Why it cannot be used with the chip and torch_npu of this process; None if it can."""
        missing = [name for name in self.operators if not chip.has_operator(name)]
        if missing:
            return (
                f"torch_npu {versions.torch_npu_version()} has no {', '.join(missing)} "
                f"(operator release {self.since} has)"
            )
        if not self.chips.include(chip.soc_number()):
            return f"SoC {chip.soc_number()}: the operator is for {self.chips.label}"
        return self.only_if() if self.only_if is not None else None

    def why_not_now(self, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        """Why a call with these arguments is the default's; None if it is not."""
        dtype = _first_dtype(args, kwargs)
        if dtype is not None and dtype not in self.dtypes:
            return f"dtype {str(dtype).removeprefix('torch.')}"
        return self.unless(*args, **kwargs) if self.unless is not None else None

    def guarded(self) -> Callable[..., Any]:
        """The function to register: the replacement where its limits allow, else the default."""
        default = overrides.default_of(self.path)

        @functools.wraps(self.function)
        def call(*args: Any, **kwargs: Any) -> Any:
            reason = self.why_not_now(args, kwargs)
            if reason is None:
                return self.function(*args, **kwargs)
            if not self.served_by_default[reason]:
                logger.info("%s: torch's own operations serve calls with %s", self.name, reason)
            self.served_by_default[reason] += 1
            return default(*args, **kwargs)

        return call


_replacements: dict[str, Replacement] = {}


def replaces(path: str, **facts: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declares the decorated function as a replacement; keywords are the fields of :class:`Replacement`.

    Raises:
        OverrideError: the point does not exist, has another signature, or is replaced twice.
    """

    def declare(function: Callable[P, R]) -> Callable[P, R]:
        overrides.check_signature(path, function)
        if path in _replacements:
            raise overrides.OverrideError(f"{path} has two replacements: remove {function.__module__}")
        _replacements[path] = Replacement(path, function, **facts)
        return function

    return declare


def replacements() -> dict[str, Replacement]:
    """Everything declared so far, by path."""
    return dict(sorted(_replacements.items()))


def _first_dtype(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.dtype | None:
    """Type of the first tensor, or of the first in a list."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, Tensor):
            return first.dtype
    return None
