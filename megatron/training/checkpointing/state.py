"""What a checkpoint contains, put together from the parts of a run."""

import argparse
from typing import Any

import torch

from megatron.core.errors import CheckpointError, NotBuiltYetError
from megatron.training.checkpointing.plain_values import NotPlainError, to_plain
from megatron.training.checkpointing.version import CURRENT_VERSION


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
    """The arguments in plain values; what has no plain form (a function, an object) is left out."""
    storable = argparse.Namespace()
    for name, value in vars(args).items():
        try:
            setattr(storable, name, to_plain(value))
        except NotPlainError:
            continue
    return storable


def to_host(content: Any) -> Any:
    """The same structure in plain values, with every tensor on the CPU, holding no more memory than it shows.

    A tensor that is a window into a large buffer would take the whole buffer to disk; it is copied. Tensors
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


def preprocess_common_state_dict(common_state_dict: dict[str, Any]) -> dict[str, Any]:
    """What of a state is the same on all ranks, for comparing it between them.

    Arguments become a dict without the rank's own numbers; the input stays as it is.
    """
    common = dict(common_state_dict)
    if "args" in common:
        own = ("rank", "local_rank")
        args = common["args"]
        fields = args if isinstance(args, dict) else vars(args)
        common["args"] = {name: value for name, value in fields.items() if name not in own}
    return common
