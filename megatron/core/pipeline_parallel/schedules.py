"""The functions that run the micro-batches of one step: forward to an output or a loss, and backward from it.

On one stage that is a loop over micro-batches. With several stages each function makes the schedule of this
rank (:mod:`planning`), a list of forward and backward passes and transfers, and runs it (:mod:`executor`).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from megatron.core import accelerator, parallel_state
from megatron.core.enums import ModelType
from megatron.core.errors import UsageError
from megatron.core.pipeline_parallel.compat import (
    clear_embedding_activation_buffer,
    convert_schedule_table_to_order,
    finish_embedding_wgrad_compute,
    get_pp_rank_microbatches,
    get_schedule_table,
    recv_backward,
    recv_forward,
    send_backward,
    send_backward_recv_forward,
    send_forward,
    send_forward_recv_backward,
)
from megatron.core.pipeline_parallel.executor import (
    StepInputs,
    averages_per_token,
    check_first_val_step,
    deallocate_output_tensor,
    finalize_gradients,
    run_schedule,
)
from megatron.core.pipeline_parallel.planning import make_schedule
from megatron.core.pipeline_parallel.transport import Shapes, get_tensor_shapes
from megatron.core.tensor_parallel import deferred_gradients
from megatron.core.tensor_parallel.replica_streams import replica_streams
from megatron.core.timers import timed
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.mtp_losses import MTPLossAutoScaler
from megatron.core.utils import get_attr_wrapped_model, get_model_config

__all__ = [
    "backward_step",
    "check_first_val_step",
    "clear_embedding_activation_buffer",
    "convert_schedule_table_to_order",
    "custom_backward",
    "deallocate_output_tensor",
    "finish_embedding_wgrad_compute",
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_with_interleaving",
    "forward_backward_pipelining_without_interleaving",
    "forward_step",
    "get_forward_backward_func",
    "get_pp_rank_microbatches",
    "get_schedule_table",
    "get_tensor_shapes",
    "recv_backward",
    "recv_forward",
    "send_backward",
    "send_backward_recv_forward",
    "send_forward",
    "send_forward_recv_backward",
    "set_current_microbatch",
]

Report = dict[str, Any]
Tensors = Tensor | None | list[Tensor | None]


def get_forward_backward_func() -> Callable[..., list[Report]]:
    """The function that runs a step in the pipeline layout in use.

    All take the keyword arguments of :func:`forward_backward_no_pipelining`.
    """
    if not parallel_state.is_initialized() or parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return forward_backward_no_pipelining
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
        return forward_backward_pipelining_with_interleaving
    return forward_backward_pipelining_without_interleaving


# --- one stage ----------------------------------------------------------------------------------------------


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
    config: Any = None,
) -> list[Report]:
    """Run all micro-batches of a step on one stage.

    Gradient reduction is held back until the last micro-batch.

    Args:
        forward_step_func: ``(data_iterator, model) -> (output, loss_func)``.
        data_iterator: micro-batches, bare or in a list with one per chunk.
        model: the model, bare or in a list of chunks.
        num_microbatches: micro-batches per step.
        seq_length, micro_batch_size: of every micro-batch, before it is split over ranks.
        decoder_seq_length: of models with an encoder.
        forward_only: no backward (evaluation).
        collect_non_loss_data: collect ``loss_func(output, non_loss_data=True)`` instead of losses.
        first_val_step: in an evaluation, whether this is its first step.
        config: settings and hooks of the schedule; those of the first chunk if None.

    Returns:
        One report per micro-batch on the last stage, [] on others.

    Raises:
        UsageError: numbers of chunks or micro-batches that cannot work; shapes other than announced.
    """
    (chunk,), (iterator,) = _per_chunk(model, data_iterator, 1)
    config = get_model_config(chunk) if config is None else config
    if num_microbatches < 1:
        raise UsageError(f"a step of {num_microbatches} micro-batches: it must have at least 1")
    reports: list[Report] = []
    total_tokens = torch.zeros((), dtype=torch.int64)
    deferred_gradients.discard()
    _only(config.param_sync_func)(chunk.parameters())
    # An evaluation draws nothing, and leaves the streams as they are.
    with contextlib.nullcontext() if forward_only else replica_streams():
        for microbatch in range(num_microbatches):
            is_last = microbatch == num_microbatches - 1
            hold_reduction_back = contextlib.nullcontext if is_last else _only(config.no_sync_func)
            with hold_reduction_back():
                output, num_tokens = forward_step(
                    forward_step_func,
                    iterator,
                    chunk,
                    num_microbatches,
                    None,
                    reports,
                    config,
                    collect_non_loss_data,
                    _recomputes(config, microbatch, forward_only),
                    check_first_val_step(first_val_step, forward_only, microbatch == 0),
                    microbatch,
                )
            # The loss function's count is on the device. Asking for its value would stop the host.
            total_tokens = num_tokens + total_tokens
            if not forward_only:
                with hold_reduction_back():
                    backward_step(None, output, None, None, config)
    if not forward_only:
        finalize_gradients(config, [chunk], total_tokens)
    return reports


def _only(hook: Any) -> Callable:
    """The function of a hook that may be None, for nothing to do, or a list with one function per chunk."""
    if hook is None:
        return contextlib.nullcontext
    return hook[0] if isinstance(hook, list | tuple) else hook


def _recomputes(config: Any, microbatch: int, forward_only: bool) -> bool | None:
    """Third argument of the forward function: whether to recompute this micro-batch in full; None: left out.

    The first so many micro-batches of those in flight keep their activations. Backward follows each forward
    pass here, so one is in flight; in an evaluation all are.
    """
    partial = config.num_microbatches_with_partial_activation_checkpoints
    if partial is None:
        return None
    return (microbatch if forward_only else 0) >= partial


# --- one micro-batch on one chunk ---------------------------------------------------------------------------


def custom_backward(output: Tensor, grad_output: Tensor | None) -> None:
    """Backward from an output whose data may have been shrunk by :func:`deallocate_output_tensor`.

    ``torch.autograd.backward`` compares the shapes of output and gradient; the engine itself looks at the
    shape the graph remembers.
    """
    if grad_output is None:
        if output.numel() != 1:
            raise UsageError(f"no gradient given for an output of {output.numel()} elements")
        grad_output = torch.ones_like(output, memory_format=torch.preserve_format)
    Variable._execution_engine.run_backward(
        tensors=(output,),
        grad_tensors=(grad_output,),
        keep_graph=False,
        create_graph=False,
        inputs=(),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def set_current_microbatch(model: torch.nn.Module, microbatch_id: int) -> None:
    """Tells the decoder's layers the number of the micro-batch; a model without a decoder is left alone."""
    try:
        decoder = get_attr_wrapped_model(model, "decoder")
    except UsageError:
        return
    for layer in getattr(decoder, "layers", ()):
        layer.current_microbatch = microbatch_id


def is_last_stage() -> bool:
    """Whether the chunk being run makes the loss; True without process groups."""
    return not parallel_state.is_initialized() or parallel_state.is_pipeline_last_stage()


def forward_step(
    forward_step_func: Callable,
    data_iterator: Iterator,
    model: torch.nn.Module,
    num_microbatches: int,
    input_tensor: Tensors,
    forward_data_store: list[Any],
    config: Any,
    collect_non_loss_data: bool = False,
    checkpoint_activations_microbatch: bool | None = None,
    is_first_microbatch: bool = False,
    current_microbatch: int | None = None,
    encoder_decoder_xattn: bool = False,
) -> tuple[Any, Tensor]:
    """Run one micro-batch forward; on the last stage turn its loss into the value to differentiate.

    Args:
        forward_step_func: ``(data_iterator, model) -> (output, loss_func)``; with
            ``checkpoint_activations_microbatch`` not None it gets that as a third argument.
        input_tensor: what the previous stage sent, bare or in a list; None on the first stage.
        forward_data_store: receives the report (or the data that is not a loss) on the last stage.
        is_first_microbatch: tell the model that weights have changed since its last forward pass.
        current_microbatch: number told to the layers.
        encoder_decoder_xattn: of models with an encoder, which do not exist yet.

    Returns:
        The output, in a list if the input was one, and the number of tokens its loss counted, an int64
        scalar, 0 where the loss function does not tell.
    """
    with timed(config, "forward-compute", log_level=2):
        set_is_first_microbatch = getattr(model, "set_is_first_microbatch", None)
        if is_first_microbatch and set_is_first_microbatch is not None:
            set_is_first_microbatch()
        if current_microbatch is not None:
            set_current_microbatch(model, current_microbatch)
        inputs = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if inputs[0] is not None:
            get_attr_wrapped_model(model, "set_input_tensor")(inputs)
        arguments = (data_iterator, model)
        if checkpoint_activations_microbatch is not None:
            arguments += (checkpoint_activations_microbatch,)
        if getattr(config, "num_moe_experts", None) or getattr(config, "mtp_num_layers", None):
            scale = _auxiliary_loss_scale(num_microbatches, config)
            MoEAuxLossAutoScaler.set_loss_scale(scale)
            MTPLossAutoScaler.set_loss_scale(scale)
        with _autocast(model, config):
            output, loss_func = forward_step_func(*arguments)
        num_tokens = torch.zeros((), dtype=torch.int64)
        if is_last_stage():
            if collect_non_loss_data:
                forward_data_store.append(loss_func(output, non_loss_data=True))
            else:
                output, num_tokens, report = _loss_and_report(loss_func(output), num_microbatches, config)
                forward_data_store.append(report)
    if isinstance(input_tensor, list) and not isinstance(output, list):
        output = [output]
    return output, num_tokens


def _auxiliary_loss_scale(num_microbatches: int, config: Any) -> Tensor:
    """What a loss of one micro-batch is multiplied by before backward, for losses that no loss function sees.

    The factors are those of :func:`_loss_and_report` and :func:`backward_step`.
    """
    scale = torch.ones((), device=accelerator.current_device())
    if config.grad_scale_func is not None:
        scale = config.grad_scale_func(scale)
    if averages_per_token(config):
        return scale
    return scale * (_context_parallel_size() / num_microbatches)


def _autocast(model: torch.nn.Module, config: Any) -> contextlib.AbstractContextManager[Any]:
    """Autocast only when it is asked for: entering it costs time on every micro-batch."""
    if not config.enable_autocast:
        return contextlib.nullcontext()
    return torch.autocast(next(model.parameters()).device.type, config.autocast_dtype)


def _context_parallel_size() -> int:
    return max(parallel_state.get_context_parallel_world_size(), 1) if parallel_state.is_initialized() else 1


def _loss_and_report(result: tuple, num_microbatches: int, config: Any) -> tuple[Any, Tensor, Any]:
    """Scale what a loss function returned: tensors, or in an evaluation also plain numbers.

    A pair is (loss, report): the loss is averaged over micro-batches. A triple is (sum of losses, number
    of tokens, report): the sum is divided by the tokens too, unless gradients are divided by the token
    count of the whole step at its end (``calculate_per_token_loss``). Gradients that are averaged over the
    data- and context-parallel ranks need a loss times the context-parallel size: these ranks hold parts of
    the same sequences, so their gradients add up.
    """
    if not isinstance(result, tuple | list) or len(result) not in (2, 3):
        raise UsageError(
            "a loss function returns (loss, report) or (sum of losses, number of tokens, report), not "
            f"{len(result) if isinstance(result, tuple | list) else type(result).__name__} of something else"
        )
    per_token = averages_per_token(config)
    if len(result) == 2:
        loss, report = result
        num_tokens = torch.zeros((), dtype=torch.int64)
        loss = loss / num_microbatches
    else:
        loss, counted, report = result
        num_tokens = torch.as_tensor(counted).detach()
        if not per_token:
            loss = loss / num_tokens.clamp(min=1) / num_microbatches
    parts = 1 if per_token else _context_parallel_size()
    loss = loss if parts <= 1 else loss * parts
    return loss, num_tokens, report


def backward_step(
    input_tensor: Tensors, output_tensor: Any, output_tensor_grad: Tensors, model_type: Any, config: Any
) -> Any:
    """Run one micro-batch backward.

    Args:
        input_tensor: inputs of the forward pass, bare or in a list, None where there was none.
        output_tensor: its outputs, bare or in a list.
        output_tensor_grad: gradients of the outputs; None for the loss, which is scaled by
            ``config.grad_scale_func``.
        model_type: one kind of model exists.

    Returns:
        Gradients of the inputs, in the form of ``input_tensor``.
    """
    with timed(config, "backward-compute", log_level=2):
        inputs = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        for tensor in inputs:
            if tensor is not None:
                tensor.retain_grad()
        output = output_tensor[0] if isinstance(output_tensor, list) else output_tensor
        grad = output_tensor_grad[0] if isinstance(output_tensor_grad, list) else output_tensor_grad
        if grad is None and config.grad_scale_func is not None:
            output = config.grad_scale_func(output)
        # What has no graph of its own (a stage without layers) has not been shrunk.
        if config.deallocate_pipeline_outputs and getattr(output, "grad_fn", None) is not None:
            custom_backward(output, grad)
        else:
            torch.autograd.backward(output, grad_tensors=grad)
        grads = [None if tensor is None else tensor.grad for tensor in inputs]
    return grads if isinstance(input_tensor, list) else grads[0]


# --- several stages -----------------------------------------------------------------------------------------


def forward_backward_pipelining_without_interleaving(
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
    config: Any = None,
) -> list[Report]:
    """1F1B, or ZB-H1 where ``config.pipeline_schedule`` says ``zb-h1``: one model chunk per rank.

    Arguments, result and errors as of :func:`forward_backward_no_pipelining`.
    """
    return _run_pipelined(
        "1f1b",
        1,
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=decoder_seq_length,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        first_val_step=first_val_step,
        config=config,
    )


def forward_backward_pipelining_with_interleaving(
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
    config: Any = None,
) -> list[Report]:
    """Interleaved 1F1B: several model chunks per rank, each with a data iterator of its own.

    ``config.microbatch_group_size_per_vp_stage`` micro-batches pass a chunk back to back. Arguments, result
    and errors as of :func:`forward_backward_no_pipelining`.
    """
    if decoder_seq_length not in (None, seq_length):
        raise UsageError(
            f"decoder_seq_length {decoder_seq_length} with seq_length {seq_length}: all virtual stages send "
            "tensors of one length; leave it out"
        )
    num_chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or len(_chunks(model))
    return _run_pipelined(
        "interleaved",
        num_chunks,
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=decoder_seq_length,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        first_val_step=first_val_step,
        config=config,
    )


def _run_pipelined(
    default_schedule: str,
    num_chunks: int,
    *,
    forward_step_func: Callable,
    data_iterator: Iterator | list[Iterator],
    model: torch.nn.Module | list[torch.nn.Module],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None,
    forward_only: bool,
    collect_non_loss_data: bool,
    first_val_step: bool | None,
    config: Any,
) -> list[Report]:
    """Make this rank's schedule of ``num_chunks`` model chunks, and run it.

    The schedule is ``config.pipeline_schedule``, or ``default_schedule`` where that says nothing.
    """
    models, iterators = _per_chunk(model, data_iterator, num_chunks)
    config = get_model_config(models[0]) if config is None else config
    step = StepInputs(
        forward_step=forward_step,
        backward_step=backward_step,
        forward_step_func=forward_step_func,
        data_iterators=iterators,
        models=models,
        num_microbatches=num_microbatches,
        tensor_shapes=_shapes(models[0], seq_length, micro_batch_size, decoder_seq_length),
        config=config,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        first_val_step=first_val_step,
    )
    name = config.pipeline_schedule or default_schedule
    actions = make_schedule(
        name,
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        num_microbatches,
        num_chunks,
        config.microbatch_group_size_per_vp_stage if name == "interleaved" else None,
        forward_only=forward_only,
    )
    return run_schedule(actions, step)


def _chunks(model: Any) -> list[torch.nn.Module]:
    """The chunks of a model, which may be bare."""
    return list(model) if isinstance(model, list | tuple | torch.nn.ModuleList) else [model]


def _per_chunk(model: Any, data_iterator: Any, num_chunks: int) -> tuple[list[torch.nn.Module], list[Any]]:
    """Models and iterators as lists of the right length."""
    models = _chunks(model)
    iterators = list(data_iterator) if isinstance(data_iterator, list | tuple) else [data_iterator]
    if len(models) != num_chunks:
        raise UsageError(f"this schedule runs {num_chunks} model chunk(s) per rank, but got {len(models)}")
    if len(iterators) != num_chunks:
        raise UsageError(f"{num_chunks} model chunk(s) need as many data iterators, but got {len(iterators)}")
    return models, iterators


def _shapes(
    model: torch.nn.Module, seq_length: int, micro_batch_size: int, decoder_seq_length: int | None
) -> Shapes:
    return get_tensor_shapes(
        rank=parallel_state.get_pipeline_model_parallel_rank(),
        model_type=getattr(model, "model_type", ModelType.encoder_or_decoder),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        decoder_seq_length=decoder_seq_length,
        config=get_model_config(model),
        encoder_decoder_xattn=False,
    )
