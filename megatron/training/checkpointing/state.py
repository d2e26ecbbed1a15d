"""Content of a checkpoint: the parts of a run as plain values, and random states and how they come back.

How an object is pickled depends on its class, and changes between versions: the member of an enumeration is a
call of its class on most Pythons, and a call of ``getattr`` on Python 3.11.0 to 3.11.3, which no careful
reader carries out. A checkpoint therefore holds tensors, arrays of numbers, built-in containers and built-in
values only, which every version of Python and NumPy can unpickle without importing anything for them.
"""

import argparse
import enum
import os
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from megatron.core import accelerator, parallel_state
from megatron.core.errors import CheckpointError, NotBuiltYetError
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.training.checkpointing import run_context
from megatron.training.checkpointing.run_context import CURRENT_VERSION
from megatron.training.utils import print_rank_0


def generate_state_dict(
    args: argparse.Namespace,
    model: list[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    rng_state: list[dict[str, Any]] | None,
    use_dist_ckpt: bool = False,
    iteration: int | None = None,
    optim_sd_kwargs: dict[str, Any] | None = None,
    rerun_state: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Put together everything that influences the next training step.

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
    """The arguments in plain values; what has no plain form (a function, an object) is left out."""
    storable = argparse.Namespace()
    for name, value in vars(args).items():
        try:
            setattr(storable, name, to_plain(value))
        except NotPlainError:
            continue
    return storable


def to_host(content: Any) -> Any:
    """The same structure in plain values, with every tensor on the CPU, in storage of its own size.

    A view of a large buffer would take the whole buffer to disk, so it is copied. Tensors
    that share their memory go on sharing it.

    Raises:
        CheckpointError: there is an object in it that a reader would refuse.
    """
    seen: dict[tuple, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        return _host_tensor(value.detach(), seen) if isinstance(value, torch.Tensor) else value

    try:
        return to_plain(content, copy)
    except NotPlainError as error:
        raise CheckpointError(
            f"the checkpoint cannot be saved: {error}, and a checkpoint holds tensors and plain values only. "
            "Let the state_dict() that it comes from return those."
        ) from None


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


_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
# Conversion of instances of subclasses, which may define another conversion than the built-in base.
_BASES: tuple[tuple[type | tuple[type, ...], Callable[[Any], Any]], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (complex, lambda value: complex(value.real, value.imag)),
    (str, str.__str__),
    ((bytes, bytearray), lambda value: bytes(memoryview(value))),
)
_SEQUENCES: tuple[tuple[Any, type], ...] = (
    ((list, deque, range), list),
    (tuple, tuple),
    ((set, frozenset), set),
)


class NotPlainError(TypeError):
    """An object that has no plain form; the message names its class and its path in the whole."""


def to_plain(value: Any, keep: Callable[[Any], Any] | None = None, path: str = "") -> Any:
    """A copy of ``value`` in built-in types alone.

    Members of enumerations become their values, NumPy's scalars Python's, paths text, and subclasses of
    built-in types (named tuples, default dictionaries ...) those types.

    Args:
        value: any structure.
        keep: makes the copy of a tensor, or of a numeric array; without it they are not plain.
        path: of ``value`` in the whole, for the message.

    Raises:
        NotPlainError: there is an object of another class in it.
    """
    if type(value) in _PLAIN_TYPES:
        return value
    if isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
        if keep is None:
            raise NotPlainError(f"{path or 'it'} is a {type(value).__name__}")
        return keep(value)
    inner = _unwrapped(value)
    if inner is not value:
        return to_plain(inner, keep, path)
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**to_plain(vars(value), keep, path))
    if isinstance(value, Mapping):
        return _plain_mapping(value, keep, path)
    for kinds, plain_kind in _SEQUENCES:
        if isinstance(value, kinds):
            return plain_kind(to_plain(item, keep, f"{path}[{i}]") for i, item in enumerate(value))
    for kind, convert in _BASES:
        if isinstance(value, kind):
            return convert(value)
    raise NotPlainError(f"{path or 'it'} is a {type(value).__module__}.{type(value).__qualname__}")


def _unwrapped(value: Any) -> Any:
    """What a member of an enumeration, a NumPy scalar or a path stands for; other values themselves."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _plain_mapping(value: Mapping, keep: Callable[[Any], Any] | None, path: str) -> dict[Any, Any]:
    items = (
        (to_plain(key, None, f"a key of {path or 'it'}"), to_plain(item, keep, f"{path}[{key!r}]"))
        for key, item in value.items()
    )
    if not isinstance(value, OrderedDict):
        return dict(items)
    copy = OrderedDict(items)
    # torch keeps the versions of modules in an attribute
    copy.__dict__.update(to_plain(vars(value), keep, path))
    return copy


def get_rng_state(ckpt_format: str) -> list[dict[str, Any]]:
    """Random states of this process, as a list with one entry.

    Data-parallel ranks share their states, unless each initialised its weights differently
    (``data_parallel_random_init``): then the list has an entry per data-parallel rank, and all of them must
    call this together.

    Raises:
        NotBuiltYetError: for a sharded checkpoint format.
    """
    if ckpt_format != "torch":
        raise NotBuiltYetError(
            "random states in a sharded checkpoint",
            f"--ckpt-format {ckpt_format}",
            "Use --ckpt-format torch.",
        )
    own = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": accelerator.get_rng_state(),
        "rng_tracker_states": get_cuda_rng_tracker().get_states(),
    }
    if not run_context.get_args().data_parallel_random_init:
        return [own]
    group = parallel_state.get_data_parallel_group()
    entries: list[dict[str, Any]] = [{}] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(entries, own, group=group)
    return entries


def set_rng_state(state_dict: dict[str, Any], data_parallel_random_init: bool) -> None:
    """Put back the random states of a checkpoint.

    A device state that another kind of device wrote cannot be read here; it is left out with a warning.

    Raises:
        CheckpointError: the checkpoint has no random states.
    """
    state = _entry_of_this_rank(state_dict, data_parallel_random_init)
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    tracker_states = state["rng_tracker_states"]
    if not tracker_states:
        raise CheckpointError(
            "the checkpoint's random states lack the named streams of dropout (rng_tracker_states is empty); "
            "go on without them with --no-load-rng"
        )
    try:
        for stream_state in (state["cuda_rng_state"], *tracker_states.values()):
            torch.Generator(device=accelerator.current_device()).set_state(stream_state)
    except (RuntimeError, TypeError) as error:
        print_rank_0(
            "WARNING: the checkpoint's device random states do not fit this device "
            f"({accelerator.device_type()}: {str(error).splitlines()[0]}); "
            "dropout goes on from the seed instead"
        )
        return
    accelerator.set_rng_state(state["cuda_rng_state"])
    get_cuda_rng_tracker().set_states(tracker_states)


def _entry_of_this_rank(state_dict: dict[str, Any], data_parallel_random_init: bool) -> dict[str, Any]:
    if "rng_state" in state_dict:
        entries = state_dict["rng_state"]
        rank = parallel_state.get_data_parallel_rank() if data_parallel_random_init else 0
        if rank >= len(entries):
            raise CheckpointError(
                f"the checkpoint has random states of {len(entries)} data-parallel rank(s), this is rank "
                f"{rank}; leave out --data-parallel-random-init or add --no-load-rng"
            )
        return entries[rank]
    if "random_rng_state" in state_dict:  # checkpoints of 2021 and before
        return state_dict
    raise CheckpointError(
        "the checkpoint holds no random states (it was saved with --no-save-rng); add --no-load-rng to load "
        "the rest of it"
    )


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def preprocess_common_state_dict(common_state_dict: dict[str, Any]) -> dict[str, Any]:
    """The part of a state that is the same on all ranks, for a comparison between them.

    Arguments become a dict without rank numbers; the input is not changed.
    """
    common = dict(common_state_dict)
    if "args" in common:
        own = ("rank", "local_rank")
        args = common["args"]
        fields = args if isinstance(args, dict) else vars(args)
        common["args"] = {name: value for name, value in fields.items() if name not in own}
    return common
