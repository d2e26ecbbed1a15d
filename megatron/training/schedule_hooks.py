"""What the loop hands to the schedule, hooks of wrapper and optimizer, and what it makes of the reports."""

import copy
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.core.distributed import finalize_model_grads
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.training.global_vars import get_args, get_timers


def schedule_config(
    config: ModelParallelConfig, model: list[torch.nn.Module], optimizer: Any
) -> ModelParallelConfig:
    """A copy of the model's configuration with what the schedule calls in a training step.

    It scales the loss, holds reductions back until the last micro-batch, and finishes the gradients. A hook
    per chunk is a list where there are several chunks. With ``--align-grad-reduce`` and
    ``--align-param-gather`` the schedule starts the collectives of all stages at the same time; without, each
    starts when its gradients, or the modules that wait for parameters, are ready.

    Args:
        config: of the model; stays as it is.
        model: wrapped chunks of this rank.
        optimizer: asked to scale losses.
    """
    args = get_args()
    hooks: dict[str, Any] = {
        "grad_scale_func": optimizer.scale_loss,
        "timers": get_timers(),
        "no_sync_func": _per_chunk([chunk.no_sync for chunk in model]),
        "finalize_model_grads_func": finalize_model_grads,
    }
    if args.overlap_grad_reduce and args.align_grad_reduce:
        hooks["grad_sync_func"] = _per_chunk([chunk.start_grad_sync for chunk in model])
    if args.overlap_param_gather and args.align_param_gather:
        hooks["param_sync_func"] = _per_chunk([chunk.start_param_sync for chunk in model])
    return with_fields(config, **hooks)


def with_fields(config: ModelParallelConfig, **changes: Any) -> ModelParallelConfig:
    """A copy of a configuration, the same but for ``changes``, which need no check."""
    changed = copy.copy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _per_chunk(hooks: list[Any]) -> Any:
    return hooks[0] if len(hooks) == 1 else hooks


def should_disable_forward_pre_hook(args: Namespace) -> bool:
    """True where modules wait for their parameters in forward, which reading weights elsewhere must not rely
    on.
    """
    return bool(args.use_distributed_optimizer and args.overlap_param_gather)


def enable_forward_pre_hook(model_chunks: list[Any]) -> None:
    """Let the modules of all chunks wait for the gathering of their parameters in forward."""
    for chunk in model_chunks:
        chunk.enable_forward_pre_hook()


def disable_forward_pre_hook(model_chunks: list[Any], param_sync: bool = True) -> None:
    """The opposite; with ``param_sync`` all parameters are gathered on return."""
    for chunk in model_chunks:
        chunk.disable_forward_pre_hook(param_sync=param_sync)


@contextmanager
def gathered_parameters(model: list[torch.nn.Module]) -> Iterator[None]:
    """Context in which every parameter is whole: for evaluation, checkpoints and norms. Takes all ranks."""
    overlapped = should_disable_forward_pre_hook(get_args())
    if overlapped:
        disable_forward_pre_hook(model)
    try:
        yield
    finally:
        if overlapped:
            enable_forward_pre_hook(model)


def average_reports(reports: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One value per loss name over the micro-batches of a step.

    A (sum, count) pair is summed over micro-batches and then divided, which weighs every token the same;
    a plain number is averaged over micro-batches.

    Args:
        reports: the loss function's reports, one per micro-batch; empty on inner pipeline stages.

    Returns:
        Loss name -> 0-dim float32 tensor.
    """
    averages = {}
    for name in reports[0] if reports else ():
        values = [report[name] for report in reports]
        if isinstance(values[0], tuple | list):
            total, count = (_stack(column).sum() for column in zip(*values, strict=True))
            averages[name] = total / count.clamp(min=1)
        else:
            averages[name] = _stack(values).mean()
    return averages


def _stack(values: Iterable[Any]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(value).detach().float() for value in values])
