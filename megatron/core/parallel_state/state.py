"""What ``initialize_model_parallel`` found out: tables that getters and the module's variables read."""

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import accelerator
from megatron.core.errors import UsageError
from megatron.core.parallel_state.groups import GROUP_NAMES


class GlobalMemoryBuffer:
    """Scratch tensors that live as long as the process, one per name and dtype, grown on demand."""

    def __init__(self) -> None:
        self.buffer: dict[tuple[str, torch.dtype], Tensor] = {}

    def get_tensor(self, tensor_shape: torch.Size | list[int], dtype: torch.dtype, name: str) -> Tensor:
        """View of the buffer ``name`` in the wanted shape, on the current device; contents are undefined."""
        numel = math.prod(tensor_shape)
        held = self.buffer.get((name, dtype))
        if held is None or held.numel() < numel:
            held = torch.empty(numel, dtype=dtype, device=accelerator.current_device(), requires_grad=False)
            self.buffer[(name, dtype)] = held
        return held[:numel].view(tuple(tensor_shape))


@dataclass
class State:
    """Groups of this rank, by the names that the public module shows them under.

    Attributes:
        groups: process groups.
        ranks: global ranks of each group, in group order.
        hierarchical: nested context-parallel groups, the innermost first; None without levels.
        by_hand: values set through ``set_*``, which win over the groups (checkpoint tools have no groups).
        memory_buffer: scratch space of the layers; None before initialisation.
        moe_log: auxiliary losses by name.
    """

    groups: dict[str, ProcessGroup] = field(default_factory=dict)
    ranks: dict[str, list[int]] = field(default_factory=dict)
    hierarchical: list[ProcessGroup] | None = None
    by_hand: dict[str, int | None] = field(default_factory=dict)
    memory_buffer: GlobalMemoryBuffer | None = None
    moe_log: dict = field(default_factory=dict)

    def clear(self) -> None:
        """Back to the state before initialisation."""
        for table in (self.groups, self.ranks, self.by_hand, self.moe_log):
            table.clear()
        self.hierarchical = self.memory_buffer = None


STATE = State()


@overload
def group(name: str) -> ProcessGroup: ...


@overload
def group(name: str, check_initialized: bool) -> ProcessGroup | None: ...


def group(name: str, check_initialized: bool = True) -> ProcessGroup | None:
    """The group called ``name``; None where there is none and ``check_initialized`` is off."""
    if check_initialized and STATE.groups.get(name) is None:
        label = name.strip("_").lower().replace("_", " ")
        raise UsageError(f"{label} is not initialized: call initialize_model_parallel() first")
    return STATE.groups.get(name)


def ranks(name: str) -> list[int]:
    """Global ranks of the group called ``name``."""
    group(name)
    return STATE.ranks[name]


def _told(by_hand: str | None) -> int | None:
    return None if by_hand is None else STATE.by_hand.get(by_hand)


def size(name: str, by_hand: str | None = None) -> int:
    """Number of ranks in a group, unless set by hand."""
    told = _told(by_hand)
    return dist.get_world_size(group(name)) if told is None else told


def rank(name: str, by_hand: str | None = None) -> int:
    """Place of this rank in a group, unless set by hand."""
    told = _told(by_hand)
    return dist.get_rank(group(name)) if told is None else told


def size_or_zero(name: str, by_hand: str | None = None) -> int:
    """As ``size``; 0 without torch.distributed."""
    return size(name, by_hand) if _told(by_hand) is not None or dist.is_initialized() else 0


def rank_or_zero(name: str, by_hand: str | None = None) -> int:
    """As ``rank``; 0 without torch.distributed."""
    return rank(name, by_hand) if _told(by_hand) is not None or dist.is_initialized() else 0


_VARIABLES_OF_RANKS = {
    "_PIPELINE_GLOBAL_RANKS": "_PIPELINE_MODEL_PARALLEL_GROUP",
    "_DATA_PARALLEL_GLOBAL_RANKS": "_DATA_PARALLEL_GROUP",
    "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": "_TENSOR_MODEL_PARALLEL_GROUP",
    "_MODEL_PARALLEL_GLOBAL_RANKS": "_MODEL_PARALLEL_GROUP",
    "_CONTEXT_PARALLEL_GLOBAL_RANKS": "_CONTEXT_PARALLEL_GROUP",
    "_EMBEDDING_GLOBAL_RANKS": "_EMBEDDING_GROUP",
    "_POSITION_EMBEDDING_GLOBAL_RANKS": "_POSITION_EMBEDDING_GROUP",
}


class _ModuleOfGroups(ModuleType):
    """Shows the groups and lists of ranks as module variables, which user code reads and tests swap."""


def _variable(table: str, name: str) -> property:
    """A module variable that stands for an entry of ``STATE``; None where there is none."""

    def write(module: ModuleType, value: Any) -> None:
        getattr(STATE, table)[name] = value

    return property(lambda module: getattr(STATE, table).get(name), write)


for _name in GROUP_NAMES:
    setattr(_ModuleOfGroups, _name, _variable("groups", _name))
for _name, _group in _VARIABLES_OF_RANKS.items():
    setattr(_ModuleOfGroups, _name, _variable("ranks", _group))


def show_as_variables(module: ModuleType) -> None:
    """Let every group and list of ranks be read and assigned as a variable of ``module``."""
    module.__class__ = _ModuleOfGroups
