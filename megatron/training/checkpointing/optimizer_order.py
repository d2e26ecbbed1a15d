"""Numbers of parameters in an optimizer's state, and their translation between two orders of the same model.

An optimizer state knows a parameter only by a number: its position when the parameter groups are laid end to
end. Groups appear in the order of their first member, members in the order in which modules register them.
Two implementations of one layer that register, say, a norm before or after a projection therefore number
differently, and states of equal shape would be swapped without anybody noticing.
"""

from collections.abc import Iterable
from typing import Any

from megatron.core.errors import CheckpointError

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
    """An optimizer state in the order of the model at hand.

    Args:
        state: ``optimizer`` of a checkpoint, fp32 or mixed-precision.
        stored: groups of the checkpoint's model, under the names of the model at hand.
        wanted: groups of the model at hand.

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
