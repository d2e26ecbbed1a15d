"""Blocking transfers between neighbouring pipeline stages, for scripts with a schedule of their own.

Activations go to the next stage and gradients to the previous one; the first stage receives no activations
and the last no gradients. Shapes are [s, b, h], types ``config.pipeline_dtype``.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.actions import Message
from megatron.core.pipeline_parallel.microbatch import timed
from megatron.core.pipeline_parallel.planning import place_in_exchange
from megatron.core.pipeline_parallel.transport import (
    Pending,
    Transfer,
    announce_shapes,
    as_sent,
    receive_buffer,
    start,
)

Shape = Sequence[int]


def recv_forward(tensor_shape: Shape, config: ModelParallelConfig) -> Tensor | None:
    """Activations from the previous stage, None on the first."""
    if parallel_state.is_pipeline_first_stage():
        return None
    with timed(config, "forward-recv"):
        received, pending = _exchange(None, None, True, False, tensor_shape, config)
        pending.wait()
    return received[False]


def recv_backward(tensor_shape: Shape, config: ModelParallelConfig) -> Tensor | None:
    """Gradients of this stage's output from the next stage, None on the last."""
    if parallel_state.is_pipeline_last_stage():
        return None
    with timed(config, "backward-recv"):
        received, pending = _exchange(None, None, False, True, tensor_shape, config)
        pending.wait()
    return received[True]


def send_forward(output_tensor: Tensor | None, config: ModelParallelConfig) -> None:
    """Activations to the next stage; nothing on the last."""
    if not parallel_state.is_pipeline_last_stage():
        with timed(config, "forward-send"):
            _exchange(output_tensor, None, False, False, None, config)[1].wait()


def send_backward(input_tensor_grad: Tensor | None, config: ModelParallelConfig) -> None:
    """Gradients to the previous stage; nothing on the first."""
    if not parallel_state.is_pipeline_first_stage():
        with timed(config, "backward-send"):
            _exchange(None, input_tensor_grad, False, False, None, config)[1].wait()


def send_forward_recv_backward(
    output_tensor: Tensor | None, tensor_shape: Shape, config: ModelParallelConfig
) -> Tensor | None:
    """Both with the next stage at once; None on the last."""
    if parallel_state.is_pipeline_last_stage():
        return None
    with timed(config, "forward-send-backward-recv"):
        received, pending = _exchange(output_tensor, None, False, True, tensor_shape, config)
        pending.wait()
    return received[True]


def send_backward_recv_forward(
    input_tensor_grad: Tensor | None, tensor_shape: Shape, config: ModelParallelConfig
) -> Tensor | None:
    """Both with the previous stage at once; None on the first."""
    if parallel_state.is_pipeline_first_stage():
        return None
    with timed(config, "backward-send-forward-recv"):
        received, pending = _exchange(None, input_tensor_grad, True, False, tensor_shape, config)
        pending.wait()
    return received[False]


def send_forward_recv_forward(
    output_tensor: Tensor | None,
    recv_prev: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
    overlap_p2p_comm: bool = False,
) -> Any:
    """Activations to the next stage (unless None) and from the previous one (if ``recv_prev``).

    Returns:
        The activations or None; with ``overlap_p2p_comm`` together with a list of handles to ``wait()`` for
        before they are used.
    """
    with timed(config, "forward-send-forward-recv"):
        received, pending = _exchange(output_tensor, None, recv_prev, False, tensor_shape, config)
        if not overlap_p2p_comm:
            pending.wait()
    return (received.get(False), [pending]) if overlap_p2p_comm else received.get(False)


def send_backward_recv_backward(
    input_tensor_grad: Tensor | None,
    recv_next: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
    overlap_p2p_comm: bool = False,
) -> Any:
    """Gradients to the previous stage (unless None) and from the next one (if ``recv_next``).

    Returns:
        As of :func:`send_forward_recv_forward`.
    """
    with timed(config, "backward-send-backward-recv"):
        received, pending = _exchange(None, input_tensor_grad, False, recv_next, tensor_shape, config)
        if not overlap_p2p_comm:
            pending.wait()
    return (received.get(True), [pending]) if overlap_p2p_comm else received.get(True)


def send_forward_backward_recv_forward_backward(
    output_tensor: Tensor | None,
    input_tensor_grad: Tensor | None,
    recv_prev: bool,
    recv_next: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
) -> tuple[Tensor | None, Tensor | None]:
    """All four at once; returns the activations and the gradients received."""
    with timed(config, "forward-backward-send-forward-backward-recv"):
        received, pending = _exchange(
            output_tensor, input_tensor_grad, recv_prev, recv_next, tensor_shape, config
        )
        pending.wait()
    return received.get(False), received.get(True)


def _exchange(
    output: Tensor | None,
    input_grad: Tensor | None,
    recv_prev: bool,
    recv_next: bool,
    shape: Shape | None,
    config: ModelParallelConfig,
) -> tuple[dict[bool, Tensor], Pending]:
    """Starts up to four transfers; what is received is keyed by whether it is a gradient."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    size = parallel_state.get_pipeline_model_parallel_world_size()
    following, preceding = (rank + 1) % size, (rank - 1) % size
    wanted = [
        (output is not None, Message(True, False, 0, 0, following)),
        (input_grad is not None, Message(True, True, 0, 0, preceding)),
        (recv_prev, Message(False, False, 0, 0, preceding)),
        (recv_next, Message(False, True, 0, 0, following)),
    ]
    # With two stages both neighbours are one rank: activations go first, at both ends.
    messages = sorted(
        (message for is_wanted, message in wanted if is_wanted),
        key=lambda message: (*place_in_exchange(message, rank, size), message.gradient),
    )
    sent = {m: as_sent(input_grad if m.gradient else output, config) for m in messages if m.send}
    places = [(m.peer, m.send) for m in messages]
    announced = (
        iter(announce_shapes(list(sent.values()), places, config)) if config.variable_seq_lengths else None
    )
    received = {
        m.gradient: receive_buffer(shape if announced is None else next(announced), config)
        for m in messages
        if not m.send
    }
    transfers = [
        Transfer(sent[m] if m.send else received[m.gradient].detach(), m.peer, m.send) for m in messages
    ]
    return received, start(transfers, config)
