"""Optimizer state: the file of sharded state, and the order of parameters in any state.

``distrib_optim.pt`` holds the state that the distributed optimizer keeps in shards, one file per model part.

An optimizer state knows a parameter only by a number: its position when the parameter groups are laid end to
end. Groups appear in the order of their first member, members in the order in which modules register them.
Two implementations of one layer that register, say, a norm before or after a projection therefore number
differently, and loading one order into the other would silently swap states of equal shape.
"""

import os
from collections.abc import Iterable
from typing import Any

from megatron.core.errors import CheckpointError
from megatron.training.checkpointing import layout, safe_load


def _members(optimizer: Any) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def is_sharded(optimizer: Any) -> bool:
    """True for an optimizer whose state is spread over data-parallel ranks."""
    return any(hasattr(member, "collects_state") for member in _members(optimizer))


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
    """Content of the file beside ``model_file`` on the ranks that distribute it, None elsewhere.

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
    return safe_load.load_dict_or_list(path)


def distribute_state(optimizer: Any, state: Any | None) -> None:
    """Distribute the content of the file to the shards. Takes all ranks."""
    if is_sharded(optimizer):
        optimizer.load_parameter_state_from_dp_zero(state)


_DECOUPLED = ("embedding.word_embeddings.weight", "output_layer.weight")
GroupKey = tuple[float, bool]


def group_names(parameters: Iterable[tuple[str, int]], decoupled_lr: bool) -> dict[GroupKey, list[str]]:
    """Parameter names by optimizer group, in the optimizer's order.

    Args:
        parameters: (name, number of dimensions) in order of registration, tied parameters once.
        decoupled_lr: whether embedding and output layer have a learning rate of their own.

    Returns:
        (weight-decay multiplier, decoupled) -> names.
    """
    groups: dict[GroupKey, list[str]] = {}
    for name, dimensions in parameters:
        decay = 0.0 if dimensions == 1 or name.endswith(".bias") else 1.0
        key = (decay, decoupled_lr and name in _DECOUPLED)
        groups.setdefault(key, []).append(name)
    return groups


def renumber(
    state: dict[str, Any], stored: dict[GroupKey, list[str]], wanted: dict[GroupKey, list[str]]
) -> dict[str, Any]:
    """An optimizer state in the order of the current model.

    Args:
        state: ``optimizer`` of a checkpoint, fp32 or mixed-precision.
        stored: groups of the checkpoint's model, under the names of the current model.
        wanted: groups of the current model.

    Raises:
        CheckpointError: the state does not have the groups that the checkpoint's model implies.
    """
    if list(stored.items()) == list(wanted.items()):
        return state
    inner = state.get("optimizer", state)
    sizes = [len(group["params"]) for group in inner["param_groups"]]
    same_members = {k: sorted(v) for k, v in stored.items()} == {k: sorted(v) for k, v in wanted.items()}
    if sizes != [len(names) for names in stored.values()] or not same_members:
        raise CheckpointError(
            f"the checkpoint's optimizer has parameter groups of sizes {sizes}, its model implies "
            f"{[len(names) for names in stored.values()]}; its parameters are named differently from this "
            "model's and cannot be matched. Load the weights alone with --no-load-optim."
        )
    number = {name: i for i, name in enumerate(name for names in stored.values() for name in names)}
    group_order = [list(stored).index(key) for key in wanted]
    result = dict(state)
    new_inner = dict(inner)
    flat = [name for names in wanted.values() for name in names]
    new_inner["state"] = {
        new: inner["state"][number[name]] for new, name in enumerate(flat) if number[name] in inner["state"]
    }
    new_inner["param_groups"] = _groups_in_order(inner["param_groups"], group_order)
    if inner is state:
        return new_inner
    result["optimizer"] = new_inner
    if "fp32_from_fp16_params" in state:
        result["fp32_from_fp16_params"] = [
            [
                state["fp32_from_fp16_params"][list(stored).index(key)][stored[key].index(name)]
                for name in names
            ]
            for key, names in wanted.items()
        ]
    return result


def _groups_in_order(groups: list[dict[str, Any]], order: list[int]) -> list[dict[str, Any]]:
    """Groups in the order given, their parameters numbered anew from 0."""
    result, start = [], 0
    for index in order:
        size = len(groups[index]["params"])
        result.append({**groups[index], "params": list(range(start, start + size))})
        start += size
    return result
