"""Order in which the micro-batches of one step run forward and backward.

On a single stage every micro-batch runs forward, then backward, and the gradients are complete with the
last one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.errors import NotBuiltYetError
from megatron.core.utils import get_model_config

Report = dict[str, Any]


def get_forward_backward_func() -> Callable:
    """The schedule for the pipeline layout in use."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise NotBuiltYetError("pipeline parallelism", remedy="Use --pipeline-model-parallel-size 1.")
    return forward_backward_no_pipelining


def forward_step(
    forward_step_func: Callable,
    data_iterator: Iterator,
    model: torch.nn.Module,
    num_microbatches: int,
    forward_data_store: list[Report],
    config: Any,
    collect_non_loss_data: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one micro-batch forward and turn its loss into the value to differentiate.

    Returns:
        The scalar (or, with ``collect_non_loss_data``, the raw output) to run backward from, and the
        number of tokens its loss counted, an int64 scalar, 0 where the loss function does not tell.
    """
    timer = config.timers("forward-compute", log_level=2) if config.timers is not None else None
    if timer is not None:
        timer.start()
    # Autocast only when it is asked for: entering it costs time on every micro-batch.
    device_type = next(model.parameters()).device.type
    with torch.autocast(device_type, config.autocast_dtype) if config.enable_autocast else nullcontext():
        output, loss_func = forward_step_func(data_iterator, model)

    num_tokens = torch.zeros((), dtype=torch.int64)
    if collect_non_loss_data:
        forward_data_store.append(loss_func(output, non_loss_data=True))
    else:
        output, num_tokens, report = _loss_and_report(loss_func(output), num_microbatches, config)
        forward_data_store.append(report)
    if timer is not None:
        timer.stop()
    return output, num_tokens


def _loss_and_report(result: tuple, num_microbatches: int, config: Any) -> tuple[torch.Tensor, Any, Report]:
    """Scale what a loss function returned.

    A pair is (loss, report): the loss is averaged over micro-batches. A triple is (sum of losses, number
    of tokens, report): the sum is divided by the tokens too, unless gradients are divided by the token
    count of the whole step at its end (``calculate_per_token_loss``).
    """
    if len(result) == 2:
        loss, report = result
        num_tokens = torch.zeros((), dtype=torch.int64)
        return loss / num_microbatches, num_tokens, report
    loss, num_tokens, report = result
    if not config.calculate_per_token_loss:
        loss = loss / num_tokens.clamp(min=1) / num_microbatches
    return loss, num_tokens.detach(), report


def backward_step(output: torch.Tensor, config: Any) -> None:
    """Run one micro-batch backward from its scalar, scaled by ``config.grad_scale_func``."""
    timer = config.timers("backward-compute", log_level=2) if config.timers is not None else None
    if timer is not None:
        timer.start()
    scaled = config.grad_scale_func(output) if config.grad_scale_func is not None else output
    scaled.backward()
    if timer is not None:
        timer.stop()


def forward_backward_no_pipelining(
    *,
    forward_step_func: Callable,
    data_iterator: Iterator | list[Iterator],
    model: torch.nn.Module | list[torch.nn.Module],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
) -> list[Report]:
    """Run all micro-batches of a step on one stage.

    Gradient reduction is held back until the last micro-batch.

    Args:
        forward_step_func: ``(data_iterator, model) -> (output, loss_func)``.
        data_iterator: micro-batches, bare or in a one-element list.
        model: the model, bare or in a one-element list; ``model.config`` holds the hooks used here.
        num_microbatches: micro-batches per step.
        seq_length, micro_batch_size, decoder_seq_length, first_val_step: for schedules that exchange
            tensors; not needed here.
        forward_only: no backward (evaluation).
        collect_non_loss_data: collect ``loss_func(output, non_loss_data=True)`` instead of losses.

    Returns:
        One report per micro-batch.
    """
    model = _only_element(model)
    data_iterator = _only_element(data_iterator)
    config = get_model_config(model)
    no_sync = config.no_sync_func or nullcontext

    reports: list[Report] = []
    total_tokens = torch.zeros((), dtype=torch.int64)
    for index in range(num_microbatches):
        is_last = index == num_microbatches - 1
        reduction: AbstractContextManager = nullcontext() if is_last else no_sync()
        with reduction:
            output, num_tokens = forward_step(
                forward_step_func,
                data_iterator,
                model,
                num_microbatches,
                reports,
                config,
                collect_non_loss_data,
            )
            total_tokens = total_tokens.to(num_tokens.device) + num_tokens
            if not forward_only:
                backward_step(output, config)

    if config.finalize_model_grads_func is not None and not forward_only:
        config.finalize_model_grads_func([model], total_tokens if config.calculate_per_token_loss else None)
    return reports


def _only_element(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise AssertionError(f"one stage without virtual stages has one model chunk, got {len(value)}")
    return value[0]
