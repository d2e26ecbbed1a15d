"""Torch's optimizers as the library uses them: without the import of torch's compiler, and with state that
loads from every layout that checkpoints hold it in.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from megatron.core.errors import CheckpointError

# How torch computes a step is this machine's choice, not the checkpoint's.
_IMPLEMENTATION_KEYS = ("foreach", "fused", "capturable", "differentiable")
# Keys that fused Adam kernels keep per group instead of per parameter.
_FUSED_ADAM_KEYS = ("step", "bias_correction")


class Untraced(torch.optim.Optimizer):
    """Mix-in that calls the bookkeeping methods as they were before torch marked them for its compiler.

    torch marks them as not to be traced by ``torch.compile``. The first call of a method so marked imports
    the whole compiler: 1 to 3 s at the start of every process, for a run that compiles nothing.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class SGD(Untraced, torch.optim.SGD):
    """``torch.optim.SGD``."""

    _untraced_step = inspect.unwrap(torch.optim.SGD.step)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what ``closure`` returned."""
        return self._untraced_step(closure)


def load_inner_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restores ``optimizer`` from the ``state_dict`` of a torch or a fused optimizer, bit for bit.

    Hyper-parameters of the param groups come from ``saved``; what it lacks stays as it is. Tensors are
    copied.

    Raises:
        CheckpointError: ``saved`` holds other groups or shapes than this optimizer. Nothing is changed then.
    """
    problems = _find_mismatches(optimizer, saved)
    if problems:
        raise CheckpointError(
            f"optimizer state does not fit this model: {'; '.join(problems)}. "
            "Resume with the model and optimizer settings of the saved run, or leave this state unread "
            "(no_load_optim)"
        )
    own_groups = optimizer.state_dict()["param_groups"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    counts = _group_steps(saved["param_groups"])
    saved_indices = [index for group in saved["param_groups"] for index in group["params"]]
    state = {}
    for own_index, (param, index) in enumerate(zip(params, saved_indices, strict=True)):
        if index in saved["state"]:
            state[own_index] = _copy_entry(saved["state"][index], param, counts.get(index))
    groups = [merge_group(own, group) for own, group in zip(own_groups, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _find_mismatches(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> list[str]:
    """What keeps ``saved`` from fitting, as one phrase each."""
    if not {"state", "param_groups"} <= saved.keys():
        return [f"it has the entries {sorted(map(str, saved))} instead of 'state' and 'param_groups'"]
    own_sizes = [len(group["params"]) for group in optimizer.param_groups]
    saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
    if own_sizes != saved_sizes:
        return [f"the checkpoint has groups of {saved_sizes} parameters, this run {own_sizes}"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    problems = []
    for position, (param, index) in enumerate(zip(params, indices, strict=True)):
        for key, value in saved["state"].get(index, {}).items():
            if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape != param.shape:
                problems.append(
                    f"{key} of parameter {position} is {list(value.shape)}, the parameter {list(param.shape)}"
                )
    return problems[:3]


def _group_steps(groups: list[dict[str, Any]]) -> dict[int, float]:
    """Step count by parameter index, for fused optimizers that keep it per group."""
    return {
        index: float(group["step"])
        for group in groups
        if group.get("step") is not None
        for index in group["params"]
    }


def _copy_entry(entry: dict[str, Any], param: torch.Tensor, group_step: float | None) -> dict[str, Any]:
    """A parameter's state: tensors of its shape beside it, the step count on the host in fp32."""
    copied: dict[str, Any] = {}
    for key, value in entry.items():
        if key == "step":
            copied[key] = torch.tensor(float(value), dtype=torch.float32)
        elif isinstance(value, torch.Tensor):
            copied[key] = value.detach().to(device=param.device, dtype=param.dtype, copy=True)
        else:
            copied[key] = value
    if "step" not in copied and group_step is not None:
        copied["step"] = torch.tensor(group_step, dtype=torch.float32)
    return copied


def merge_group(own: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Saved hyper-parameters of a group over this run's, with this run's parameters."""
    kept = {key: value for key, value in saved.items() if key not in _FUSED_ADAM_KEYS}
    here = {key: own[key] for key in ("params", *_IMPLEMENTATION_KEYS) if key in own}
    return {**own, **kept, **here}
