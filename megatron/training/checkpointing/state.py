"""What a checkpoint contains, put together from the parts of a run."""

import argparse
import enum
import os
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from megatron.core.errors import NotBuiltYetError
from megatron.training.checkpointing.safe_load import ENUMS
from megatron.training.checkpointing.version import CURRENT_VERSION

_PLAIN_TYPES = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
_LEFT_OUT = object()


def generate_state_dict(
    args: argparse.Namespace,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    rng_state: list[dict[str, Any]] | None,
    use_dist_ckpt: bool = False,
    iteration: int | None = None,
    optim_sd_kwargs: dict[str, Any] | None = None,
    rerun_state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that influences the next training step.

    Args:
        args: arguments of the run, with the number of samples consumed so far.
        model: unwrapped model chunks of this rank; several with virtual pipeline stages.
        optimizer: optimizer or None; left out with ``--no-save-optim``.
        opt_param_scheduler: learning-rate and weight-decay schedule or None; likewise.
        rng_state: random states; left out with ``--no-save-rng``.
        use_dist_ckpt: sharded formats.
        iteration: number of finished iterations.
        optim_sd_kwargs: settings of sharded optimizer states.
        rerun_state: state of the fault-detection machine, if it has one.
    """
    if use_dist_ckpt:
        raise NotBuiltYetError(
            "a sharded checkpoint", f"--ckpt-format {args.ckpt_format}", "Use --ckpt-format torch."
        )
    state: dict[str, Any] = {"args": storable_args(args), "checkpoint_version": CURRENT_VERSION}
    if iteration is not None:
        state["iteration"] = iteration
    for key, chunk in zip(model_keys(len(model)), model, strict=True):
        state[key] = chunk.state_dict_for_save_checkpoint()
    if not args.no_save_optim:
        if optimizer is not None and not getattr(optimizer, "is_stub_optimizer", False):
            state["optimizer"] = optimizer.state_dict()
        if opt_param_scheduler is not None:
            state["opt_param_scheduler"] = opt_param_scheduler.state_dict()
    if rerun_state is not None:
        state["rerun_state_machine"] = rerun_state
    if not args.no_save_rng:
        state["rng_state"] = rng_state
    return state


def model_keys(chunks: int) -> list[str]:
    """Names under which the model chunks of a rank are stored."""
    return ["model"] if chunks == 1 else [f"model{index}" for index in range(chunks)]


def storable_args(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments that a reader without this package can unpickle; the others are left out."""
    storable = {name: _storable_value(value) for name, value in vars(args).items()}
    return argparse.Namespace(**{name: value for name, value in storable.items() if value is not _LEFT_OUT})


def _storable_value(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN_TYPES:
        return value
    if isinstance(value, enum.Enum):
        return value if kind in ENUMS.values() else _LEFT_OUT
    if isinstance(value, np.generic):
        return _storable_value(value.item())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind in (list, tuple, set):
        items = [_storable_value(item) for item in value]
        return _LEFT_OUT if any(item is _LEFT_OUT for item in items) else kind(items)
    if kind is dict:
        keys, values = (_storable_value(list(part)) for part in (value.keys(), value.values()))
        return _LEFT_OUT if _LEFT_OUT in (keys, values) else dict(zip(keys, values, strict=True))
    return _LEFT_OUT


def to_host(value: Any) -> Any:
    """The same structure with every tensor on the CPU, holding no more memory than it shows.

    A tensor that is a window into a large buffer would take the whole buffer to disk; it is copied. Tensors
    that share their memory go on sharing it.
    """
    return _to_host(value, {})


def _to_host(value: Any, seen: dict[tuple, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return _host_tensor(value.detach(), seen)
    if isinstance(value, OrderedDict):
        copy = OrderedDict((key, _to_host(item, seen)) for key, item in value.items())
        copy.__dict__.update(value.__dict__)  # torch keeps module versions in an attribute
        return copy
    if type(value) is dict:
        return {key: _to_host(item, seen) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_to_host(item, seen) for item in value)
    return value


def _host_tensor(tensor: torch.Tensor, seen: dict[tuple, torch.Tensor]) -> torch.Tensor:
    storage = tensor.untyped_storage()
    identity = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    if tensor.numel() == 0 or identity not in seen:
        host = tensor.cpu()
        if host.untyped_storage().nbytes() > host.numel() * host.element_size():
            host = host.clone()
        if tensor.numel() == 0:
            return host
        seen[identity] = host
    return seen[identity]
