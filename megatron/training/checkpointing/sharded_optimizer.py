"""``distrib_optim.pt``: state that the distributed optimizer keeps in shards, as one file per model part."""

import os
from typing import Any

from megatron.core.errors import CheckpointError
from megatron.training.checkpointing import layout, safe_load


def _members(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def is_sharded(optimizer: Any) -> bool:
    """True for an optimizer whose state is spread over data-parallel ranks."""
    return any(hasattr(member, "get_parameter_state_dp_zero") for member in _members(optimizer))


def gathered_state(optimizer: Any) -> Any | None:
    """The whole state on the first rank of each data-parallel group, None elsewhere. Takes all ranks.

    One member's state is a dict; that of several is a list, as the file has it.
    """
    if not is_sharded(optimizer):
        return None
    state = optimizer.get_parameter_state_dp_zero()
    parts = state if isinstance(state, list) else [state]
    return None if all(part is None for part in parts) else state


def read_state(optimizer: Any, model_file: str) -> Any | None:
    """Content of the file beside ``model_file`` on the ranks that hand it out, None elsewhere.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    if not is_sharded(optimizer) or not any(member.collects_state for member in _members(optimizer)):
        return None
    path = layout.get_distributed_optimizer_checkpoint_name(model_file)
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{path} does not exist, and this run has --use-distributed-optimizer: leave the flag out if the "
            "checkpoint was saved without it, or load the weights alone with --no-load-optim"
        )
    return safe_load.load_file(path)


def distribute_state(optimizer: Any, state: Any | None) -> None:
    """Hand the content of the file out to the shards. Takes all ranks."""
    if is_sharded(optimizer):
        optimizer.load_parameter_state_from_dp_zero(state)
