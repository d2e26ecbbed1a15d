"""The public functions that run the micro-batches of one step through the pipeline.

Each makes the schedule of this rank (:mod:`planning`) and runs it (:mod:`executor`).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.errors import NotBuiltYetError, UsageError
from megatron.core.pipeline_parallel import p2p_communication as p2p
from megatron.core.pipeline_parallel.executor import Step, run_schedule
from megatron.core.pipeline_parallel.microbatch import (
    backward_step,
    check_first_val_step,
    custom_backward,
    deallocate_output_tensor,
    forward_step,
    set_current_microbatch,
)
from megatron.core.pipeline_parallel.orders import num_warmup, schedule_table
from megatron.core.pipeline_parallel.planning import make_schedule
from megatron.core.utils import drain_embedding_wgrad_compute, get_attr_wrapped_model, get_model_config

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
Shapes = list[tuple[int, ...]]


def get_forward_backward_func() -> Callable[..., list[Report]]:
    """The function that runs a step in the pipeline layout in use.

    All take the keyword arguments of :func:`forward_backward_no_pipelining`.
    """
    if not parallel_state.is_initialized() or parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return forward_backward_no_pipelining
    if parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None:
        return forward_backward_pipelining_with_interleaving
    return forward_backward_pipelining_without_interleaving


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
        data_iterator: micro-batches, bare or in a list with one per chunk.
        model: the model, bare or in a list of chunks; ``config`` of the first holds the hooks used here.
        num_microbatches: micro-batches per step.
        seq_length, micro_batch_size: of every micro-batch, before it is split over ranks.
        decoder_seq_length: of models with an encoder.
        forward_only: no backward (evaluation).
        collect_non_loss_data: collect ``loss_func(output, non_loss_data=True)`` instead of losses.
        first_val_step: in an evaluation, whether this is its first step.

    Returns:
        One report per micro-batch on the last stage, [] on others.

    Raises:
        UsageError: numbers of chunks or micro-batches that cannot work; shapes other than announced.
    """
    models, iterators = _per_chunk(model, data_iterator, 1)
    return run_schedule(
        make_schedule("1f1b", 1, 0, num_microbatches, forward_only=forward_only),
        Step(
            forward_step_func,
            iterators,
            models,
            num_microbatches,
            (),
            get_model_config(models[0]),
            forward_only,
            collect_non_loss_data,
            first_val_step,
        ),
    )


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
) -> list[Report]:
    """1F1B, or ZB-H1 where ``config.pipeline_schedule`` says ``zb-h1``: one model chunk per rank.

    Arguments, result and errors as of :func:`forward_backward_no_pipelining`.
    """
    models, iterators = _per_chunk(model, data_iterator, 1)
    config = get_model_config(models[0])
    name = config.pipeline_schedule or "1f1b"
    return _run_pipelined(
        name,
        forward_step_func,
        iterators,
        models,
        num_microbatches,
        _shapes(models[0], seq_length, micro_batch_size, decoder_seq_length),
        forward_only,
        collect_non_loss_data,
        first_val_step,
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
    num_chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or len(model)
    models, iterators = _per_chunk(model, data_iterator, num_chunks)
    name = get_model_config(models[0]).pipeline_schedule or "interleaved"
    return _run_pipelined(
        name,
        forward_step_func,
        iterators,
        models,
        num_microbatches,
        _shapes(models[0], seq_length, micro_batch_size, decoder_seq_length),
        forward_only,
        collect_non_loss_data,
        first_val_step,
    )


def _run_pipelined(
    name: str,
    forward_step_func: Callable,
    iterators: list[Iterator],
    models: list[torch.nn.Module],
    num_microbatches: int,
    tensor_shapes: Shapes,
    *flags: Any,
) -> list[Report]:
    config = get_model_config(models[0])
    actions = make_schedule(
        name,
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_rank(),
        num_microbatches,
        len(models),
        config.microbatch_group_size_per_vp_stage if name == "interleaved" else None,
        forward_only=flags[0],
    )
    step = Step(forward_step_func, iterators, models, num_microbatches, tensor_shapes, config, *flags)
    return run_schedule(actions, step)


def _per_chunk(model: Any, data_iterator: Any, num_chunks: int) -> tuple[list[torch.nn.Module], list[Any]]:
    """Models and iterators as lists of the right length."""
    models = list(model) if isinstance(model, list | tuple | torch.nn.ModuleList) else [model]
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


def get_tensor_shapes(
    *,
    rank: int,
    model_type: ModelType,
    seq_length: int,
    micro_batch_size: int,
    decoder_seq_length: int | None,
    config: Any,
    encoder_decoder_xattn: bool,
) -> Shapes:
    """Shapes of what a stage receives: [s / cp (/ tp under sequence parallelism), b, h].

    Raises:
        NotBuiltYetError: a model of encoder and decoder, whose stages exchange two tensors.
    """
    if model_type is ModelType.encoder_and_decoder or encoder_decoder_xattn:
        raise NotBuiltYetError("a pipeline of encoder and decoder stages")
    parts = config.context_parallel_size
    if config.sequence_parallel:
        parts *= config.tensor_model_parallel_size
    # Where shapes are announced before each transfer, only the number of tensors matters.
    hidden_size = getattr(config, "hidden_size", 0)
    if seq_length % parts and not config.variable_seq_lengths:
        raise UsageError(
            f"seq_length {seq_length} is not divisible by the {parts} ranks that share a sequence"
        )
    if not hidden_size and not config.variable_seq_lengths:
        raise UsageError(
            f"the model's {type(config).__name__} has no hidden_size, the width of what stages send: set "
            "config.hidden_size, or variable_seq_lengths=True"
        )
    return [(seq_length // parts, micro_batch_size, hidden_size)]


def get_pp_rank_microbatches(
    num_microbatches: int,
    num_model_chunks: int,
    microbatch_group_size_per_vp_stage: int,
    forward_only: bool = False,
) -> tuple[int, bool, int, int]:
    """How this rank's forward passes divide: (total, all of them warm-up?, warm-up, others)."""
    total = num_microbatches * num_model_chunks
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1 and not forward_only:
        warmup = min(1, total)
    else:
        interleaved = parallel_state.get_virtual_pipeline_model_parallel_world_size() is not None
        warmup = num_warmup(
            stages,
            parallel_state.get_pipeline_model_parallel_rank(),
            num_microbatches,
            num_model_chunks if interleaved or forward_only else None,
            microbatch_group_size_per_vp_stage,
            forward_only,
        )
    return total, warmup == total, warmup, total - warmup


def clear_embedding_activation_buffer(config: Any, model: Any) -> torch.nn.Module | None:
    """Empties the buffer of activations that a model keeps for its output layer's late weight gradient.

    Returns:
        The model inside its wrappers, for :func:`finish_embedding_wgrad_compute`; None on other stages than
        the last and without ``config.defer_embedding_wgrad_compute``.
    """
    if not _keeps_output_layer_for_the_flush(config):
        return None
    last = model[-1] if isinstance(model, list) else model
    embedding_module = get_attr_wrapped_model(last, "post_process", return_model_obj=True)
    embedding_module.embedding_activation_buffer.clear()
    return embedding_module


def finish_embedding_wgrad_compute(config: Any, embedding_module: torch.nn.Module | None) -> None:
    """Computes the weight gradients of the output layer that the model's buffers hold the operands of."""
    if not _keeps_output_layer_for_the_flush(config) or embedding_module is None:
        return
    weight = (
        embedding_module.shared_embedding_or_output_weight()
        if embedding_module.share_embeddings_and_output_weights
        else embedding_module.output_layer.weight
    )
    buffers = embedding_module.embedding_activation_buffer, embedding_module.grad_output_buffer
    drain_embedding_wgrad_compute(config, *buffers, weight)


def _keeps_output_layer_for_the_flush(config: Any) -> bool:
    return config.defer_embedding_wgrad_compute and parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def get_schedule_table(
    num_microbatches: int, num_model_chunks: int, microbatch_group_size_per_vp_stage: int
) -> list[tuple[int, int]]:
    """(micro-batch, chunk) of the forward passes of a rank, in order."""
    return schedule_table(num_microbatches, num_model_chunks, microbatch_group_size_per_vp_stage)


def convert_schedule_table_to_order(
    num_warmup_microbatches: int, num_model_chunks: int, schedule_table: list[tuple[int, int]]
) -> list[int]:
    """Chunks in the order a rank computes them, counted from 1: forward positive, backward negative.

    Backward passes go through the table with the chunks counted from the last.
    """
    forwards = [chunk + 1 for _, chunk in schedule_table]
    backwards = [chunk - num_model_chunks for _, chunk in schedule_table]
    order = forwards[:num_warmup_microbatches]
    for pair in zip(forwards[num_warmup_microbatches:], backwards, strict=False):
        order += pair
    return order + backwards[len(forwards) - num_warmup_microbatches :]


def recv_forward(tensor_shapes: Shapes, config: Any) -> list[Tensor | None]:
    """Receive activations from the previous stage, one per shape."""
    return [p2p.recv_forward(shape, config) for shape in tensor_shapes]


def recv_backward(tensor_shapes: Shapes, config: Any) -> list[Tensor | None]:
    """Receive gradients of the outputs from the next stage, one per shape."""
    return [p2p.recv_backward(shape, config) for shape in tensor_shapes]


def send_forward(output_tensors: Any, tensor_shapes: Shapes, config: Any) -> None:
    """Send activations to the next stage."""
    for tensor, _ in zip(_listed(output_tensors), tensor_shapes, strict=True):
        p2p.send_forward(tensor, config)


def send_backward(input_tensor_grads: Any, tensor_shapes: Shapes, config: Any) -> None:
    """Send gradients of the inputs to the previous stage."""
    for tensor, _ in zip(_listed(input_tensor_grads), tensor_shapes, strict=True):
        p2p.send_backward(tensor, config)


def send_forward_recv_backward(
    output_tensors: Any, tensor_shapes: Shapes, config: Any
) -> list[Tensor | None]:
    """Exchange activations for gradients with the next stage."""
    return [
        p2p.send_forward_recv_backward(tensor, shape, config)
        for tensor, shape in zip(_listed(output_tensors), tensor_shapes, strict=True)
    ]


def send_backward_recv_forward(
    input_tensor_grads: Any, tensor_shapes: Shapes, config: Any
) -> list[Tensor | None]:
    """Exchange gradients for activations with the previous stage."""
    return [
        p2p.send_backward_recv_forward(tensor, shape, config)
        for tensor, shape in zip(_listed(input_tensor_grads), tensor_shapes, strict=True)
    ]


def _listed(tensors: Any) -> list[Tensor | None]:
    return tensors if isinstance(tensors, list) else [tensors]
