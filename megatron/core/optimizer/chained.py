"""Several optimizers that step as one."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.errors import CheckpointError
from megatron.core.optimizer.base import MegatronOptimizer, no_sharded_state
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


class ProxyDict:
    """A view over several dicts, with keys (number of the dict, key in it)."""

    def __init__(self, inner_dicts: list[dict[Any, Any]]):
        self._inner_dicts = inner_dicts

    def __getitem__(self, key: tuple[int, Any]) -> Any:
        number, inner_key = key
        return self._inner_dicts[number][inner_key]

    def __setitem__(self, key: tuple[int, Any], value: Any) -> None:
        number, inner_key = key
        self._inner_dicts[number][inner_key] = value

    def __len__(self) -> int:
        return sum(map(len, self._inner_dicts))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return ((number, key) for number, inner in enumerate(self._inner_dicts) for key in inner)

    def items(self) -> Iterator[tuple[tuple[int, Any], Any]]:
        """Pairs of a full key and its value."""
        return ((key, self[key]) for key in self)


class ChainedOptimizer(MegatronOptimizer):
    """Steps its members together: an overflow in one skips all, and one norm over all decides on clipping.

    Args:
        chained_optimizers: members; optimizers of torch are good for their groups, state and zeroing alone.

    Attributes:
        config: of the first member, or None where it has none.
    """

    def __init__(self, chained_optimizers: list[MegatronOptimizer]):
        # Not the base class's constructor: there is no torch optimizer of the chain's own to wrap.
        self._members = chained_optimizers
        self.config = getattr(chained_optimizers[0], "config", None) if chained_optimizers else None
        self.is_stub_optimizer = False

    @property
    def chained_optimizers(self) -> list[MegatronOptimizer]:
        return self._members

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer of an only member.

        Raises:
            AttributeError: there are several.
        """
        if len(self.chained_optimizers) > 1:
            raise AttributeError(
                f"{len(self.chained_optimizers)} chained optimizers have no single torch optimizer: "
                "ask one of .chained_optimizers"
            )
        return self.chained_optimizers[0].optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for member in self.chained_optimizers for group in member.param_groups]

    @property
    def state(self) -> ProxyDict:
        return ProxyDict([member.state for member in self.chained_optimizers])

    def prepare_grads(self) -> bool:
        found_inf = self.unscale_grads()
        self.update_loss_scale(found_inf)
        return found_inf

    def unscale_grads(self) -> bool:
        # All members, also after an overflow: each takes part in collectives of its own.
        overflows = [member.unscale_grads() for member in self.chained_optimizers]
        return any(overflows)

    def update_loss_scale(self, found_inf: bool) -> None:
        # All alike: there is one loss, scaled by the first member's.
        for member in self.chained_optimizers:
            member.update_loss_scale(found_inf)

    def step_with_ready_grads(self) -> bool:
        """Updates the parameters of every member; returns whether all did."""
        successes = [member.step_with_ready_grads() for member in self.chained_optimizers]
        return all(successes)

    def zero_grad(self, set_to_none: bool = True) -> None:
        for member in self.chained_optimizers:
            member.zero_grad(set_to_none)

    def grads_states_parallel_group_is_shared(self) -> bool:
        """True when all members add their statistics up over the same ranks."""
        groups = [member.get_grad_stats_parallel_group() for member in self.chained_optimizers]
        return all(group is groups[0] for group in groups)

    def get_grad_stats_parallel_group(self) -> dist.ProcessGroup | None:
        return self.chained_optimizers[0].get_grad_stats_parallel_group()

    def get_main_grads_for_grad_norm(self) -> list[Tensor]:
        return [grad for member in self.chained_optimizers for grad in member.get_main_grads_for_grad_norm()]

    def get_grad_norm(self) -> float:
        if self.grads_states_parallel_group_is_shared():
            return super().get_grad_norm()
        return math.sqrt(sum(member.get_grad_norm() ** 2 for member in self.chained_optimizers))

    def count_zeros(self) -> float:
        return sum(member.count_zeros() for member in self.chained_optimizers)

    def get_loss_scale(self) -> Tensor:
        return self.chained_optimizers[0].get_loss_scale()

    def reload_model_params(self) -> None:
        for member in self.chained_optimizers:
            member.reload_model_params()

    def state_dict(self) -> dict[str, Any] | list[dict[str, Any]]:
        """State of an only member as it is, of several as a list."""
        states = [member.state_dict() for member in self.chained_optimizers]
        return states[0] if len(states) == 1 else states

    def load_state_dict(self, state_dict: dict[Any, Any] | list[dict[str, Any]]) -> None:
        """Takes what :meth:`state_dict` gives; several members also a dict keyed by their number."""
        if len(self.chained_optimizers) == 1:
            saved = [state_dict] if isinstance(state_dict, dict) else list(state_dict)
        else:
            saved = (
                [state_dict[key] for key in sorted(state_dict)]
                if isinstance(state_dict, dict)
                else state_dict
            )
        if len(saved) != len(self.chained_optimizers):
            raise CheckpointError(
                f"the checkpoint holds {len(saved)} chained optimizers, this run has "
                f"{len(self.chained_optimizers)}: "
                "resume with the expert-parallel settings of the saved run, or leave this state unread "
                "(no_load_optim)"
            )
        for member, member_state in zip(self.chained_optimizers, saved, strict=True):
            member.load_state_dict(member_state)

    # --- sharded state --------------------------------------------------------------------------------------

    def get_parameter_state_dp_zero(self) -> Any:
        """State of an only member as it is, of several as a list; see :class:`DistributedOptimizer`.

        Parts are None on ranks that are not the first of their data-parallel group.
        """
        states = [member.get_parameter_state_dp_zero() for member in self._sharded_members()]
        return states[0] if len(states) == 1 else states

    def load_parameter_state_from_dp_zero(
        self, state_dict: Any, *, update_legacy_format: bool = False
    ) -> None:
        """Takes what :meth:`get_parameter_state_dp_zero` gave; None on ranks that have nothing to hand out.

        Raises:
            CheckpointError: it was saved with other buffers, or another number of members.
        """
        members = self._sharded_members()
        if len(members) == 1 and not isinstance(state_dict, list):
            state_dict = [state_dict]
        states = [None] * len(members) if state_dict is None else state_dict
        if not isinstance(states, list) or len(states) != len(members):
            raise CheckpointError(
                f"the distributed optimizer's state is not of {len(members)} chained optimizers, as this run "
                "has: resume with the expert-parallel settings of the saved run, or leave this state unread "
                "(no_load_optim)"
            )
        for member, state in zip(members, states, strict=True):
            member.load_parameter_state_from_dp_zero(state, update_legacy_format=update_legacy_format)

    def save_parameter_state(self, filename: str) -> None:
        """Writes ``distrib_optim.pt`` from the ranks that collect state; all ranks must call it."""
        state = self.get_parameter_state_dp_zero()
        if any(part is not None for part in (state if isinstance(state, list) else [state])):
            torch.save(state, filename)

    def load_parameter_state(self, filename: str, *, update_legacy_format: bool = False) -> None:
        """Reads what :meth:`save_parameter_state` wrote and distributes it."""
        is_first = [member.collects_state for member in self._sharded_members()]
        state = torch.load(filename, map_location="cpu", weights_only=True) if any(is_first) else None
        self.load_parameter_state_from_dp_zero(state, update_legacy_format=update_legacy_format)

    def _sharded_members(self) -> list[DistributedOptimizer]:
        sharded = [member for member in self.chained_optimizers if isinstance(member, DistributedOptimizer)]
        if not sharded or len(sharded) < len(self.chained_optimizers):
            raise no_sharded_state()
        return sharded
