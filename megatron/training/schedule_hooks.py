"""What ties model wrapper, optimizer and pipeline schedule together: callbacks in the model's config."""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.core.distributed import finalize_model_grads
from megatron.training.global_vars import get_args, get_timers


def connect(model: list[torch.nn.Module], optimizer: Any, config: Any) -> None:
    """Give the schedule its callbacks: scale a loss, hold reductions back, start them, finish gradients.

    A callback per chunk is a list where there are several chunks. With ``--align-grad-reduce`` and
    ``--align-param-gather`` the schedule starts the collectives of all stages at the same time; without, each
    starts when its gradients, or the modules that wait for parameters, are ready.

    Args:
        model: wrapped chunks of this rank.
        optimizer: asked to scale losses.
        config: of the model, read by the schedule.
    """
    args = get_args()
    for chunk in model:
        chunk.train()
    config.grad_scale_func = optimizer.scale_loss
    config.timers = get_timers()
    config.no_sync_func = _per_chunk([chunk.no_sync for chunk in model])
    if args.overlap_grad_reduce and args.align_grad_reduce:
        config.grad_sync_func = _per_chunk([chunk.start_grad_sync for chunk in model])
    if args.overlap_param_gather and args.align_param_gather:
        config.param_sync_func = _per_chunk([chunk.start_param_sync for chunk in model])
    config.finalize_model_grads_func = finalize_model_grads


def _per_chunk(callbacks: list[Any]) -> Any:
    return callbacks[0] if len(callbacks) == 1 else callbacks


def should_disable_forward_pre_hook(args: Namespace) -> bool:
    """True where modules wait for their parameters in forward, which reading weights elsewhere must not rely
    on.
    """
    return bool(args.use_distributed_optimizer and args.overlap_param_gather)


def enable_forward_pre_hook(model_chunks: list[torch.nn.Module]) -> None:
    """Let the modules of all chunks wait for the gathering of their parameters in forward."""
    for chunk in model_chunks:
        chunk.enable_forward_pre_hook()


def disable_forward_pre_hook(model_chunks: list[torch.nn.Module], param_sync: bool = True) -> None:
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
