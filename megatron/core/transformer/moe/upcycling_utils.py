"""A model with experts from a dense one, by copying its MLPs (Komatsuzaki et al., 2022)."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core.errors import ConfigError

_EXPERT = re.compile(r"(.*mlp\.)experts\.(?:local_experts\.\d+\.)?(linear_fc[12])\.weight\d*")
_GROUPED = re.compile(r"(.*mlp\.)experts\.weight([12])")


def upcycle_state_dict(
    moe_model: Sequence[torch.nn.Module], dense_model: Sequence[torch.nn.Module]
) -> dict[str, dict[str, Any]]:
    """Weights for a model with experts, from those of a dense model of the same shape and layout.

    Experts get the MLP of their layer; routers, and shared experts if there are any, keep what they have.
    With routing weights that add up to 1, the new model computes what the dense one does.

    Args:
        moe_model: this rank's chunks of the model with experts.
        dense_model: those of the dense model.

    Returns:
        State dicts under "model", or "model0", "model1" ... of several chunks.

    Raises:
        ConfigError: the models do not fit each other.
    """
    if len(moe_model) != len(dense_model):
        raise ConfigError(
            f"{len(moe_model)} chunks with experts, but {len(dense_model)} dense ones: give both one layout"
        )
    states = [
        _upcycled(moe.state_dict(), dense.state_dict())
        for moe, dense in zip(moe_model, dense_model, strict=True)
    ]
    if len(states) == 1:
        return {"model": states[0]}
    return {f"model{number}": state for number, state in enumerate(states)}


def _upcycled(moe: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(name, value, dense) for name, value in moe.items()}


def _value(name: str, fresh: Any, dense: dict[str, Any]) -> Any:
    """The dense model's value where it has one, else the fresh one."""
    if not isinstance(fresh, Tensor):
        return fresh
    if match := _EXPERT.fullmatch(name):
        return _fitting(name, fresh, dense.get(f"{match[1]}{match[2]}.weight"))
    if match := _GROUPED.fullmatch(name):
        whole = dense.get(f"{match[1]}linear_fc{match[2]}.weight")
        if whole is None or whole.numel() == 0 or fresh.numel() % whole.numel():
            raise ConfigError(_mismatch(name, whole, fresh))
        # [out, in] -> one block [in, out] for each expert, in the memory order of grouped experts
        experts = fresh.numel() // whole.numel()
        return whole.t().unsqueeze(0).repeat(experts, 1, 1).reshape(fresh.shape)
    # The norm before an MLP stands apart from it where the MLP has become a mixture.
    within = re.sub(r"pre_mlp_layernorm\.(\w+)$", r"mlp.linear_fc1.layer_norm_\1", name)
    source = next((each for each in (name, within) if isinstance(dense.get(each), Tensor)), None)
    return fresh if source is None else _fitting(name, fresh, dense[source])


def _fitting(name: str, fresh: Tensor, value: Tensor | None) -> Tensor:
    if value is None or value.shape != fresh.shape:
        raise ConfigError(_mismatch(name, value, fresh))
    return value.clone()


def _mismatch(name: str, found: Tensor | None, wanted: Tensor) -> str:
    shape = "nothing" if found is None else f"a tensor of shape {tuple(found.shape)}"
    return (
        f"{name} is of shape {tuple(wanted.shape)}, but the dense model has {shape} for it: give experts the "
        "width of its MLP (moe_ffn_hidden_size), and split them over as many ranks"
    )


def load_and_upcycle_model(
    load_dense_ckpt_func: Callable[..., tuple[Any, Any]],
    moe_model: Sequence[torch.nn.Module],
    dense_model: Sequence[torch.nn.Module],
    strict: bool = True,
    load_args: tuple = (),
    load_kwargs: dict[str, Any] = {},  # noqa: B006  (read only)
) -> tuple[Any, Any]:
    """Loads the dense model with ``load_dense_ckpt_func(*load_args, **load_kwargs)`` and upcycles it.

    Returns:
        What the function returned: iteration, and operations so far.
    """
    progress = load_dense_ckpt_func(*load_args, **load_kwargs)
    states = upcycle_state_dict(moe_model, dense_model)
    for chunk, state in zip(moe_model, states.values(), strict=True):
        chunk.load_state_dict(state, strict=strict)
    return progress
