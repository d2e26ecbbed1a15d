"""Functions of Megatron's schedules module for schedules of one's own; nothing here calls them.

They are importable from :mod:`megatron.core.pipeline_parallel.schedules`, their public place.
"""

from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import p2p_communication as p2p
from megatron.core.pipeline_parallel.orders import num_warmup, schedule_table
from megatron.core.utils import drain_embedding_wgrad_compute, get_attr_wrapped_model

Shapes = list[tuple[int, ...]]


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


def finish_embedding_wgrad_compute(config: Any, embedding_module: Any) -> None:
    """Computes the weight gradients of the output layer that the model's buffers hold the operands of.

    Args:
        config: of the model.
        embedding_module: what :func:`clear_embedding_activation_buffer` returned, a language model or None.
    """
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
