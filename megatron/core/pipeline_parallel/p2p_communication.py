"""Blocking transfers between neighbouring pipeline stages, for scripts with a schedule of their own.

Activations go to the next stage and gradients to the previous one; the first stage receives no activations
and the last no gradients. Shapes are [s, b, h], types ``config.pipeline_dtype``.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.errors import UsageError
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.actions import Message
from megatron.core.pipeline_parallel.planning import place_in_exchange
from megatron.core.pipeline_parallel.transport import (
    Pending,
    Transfer,
    announce_shapes,
    as_sent,
    receive_buffer,
    start,
)
from megatron.core.timers import timed

Shape = Sequence[int]


def _messages(output: bool, input_grad: bool, recv_prev: bool, recv_next: bool) -> list[Message]:
    """The transfers wanted, in the order in which both ends start them."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    size = parallel_state.get_pipeline_model_parallel_world_size()
    following, preceding = (rank + 1) % size, (rank - 1) % size
    wanted = [
        (output, Message(True, False, 0, 0, following)),
        (input_grad, Message(True, True, 0, 0, preceding)),
        (recv_prev, Message(False, False, 0, 0, preceding)),
        (recv_next, Message(False, True, 0, 0, following)),
    ]
    # With two stages both neighbours are one rank: activations go first, at both ends.
    return sorted(
        (message for is_wanted, message in wanted if is_wanted),
        key=lambda message: (*place_in_exchange(message, rank, size), message.gradient),
    )


def _by_kind(output: Tensor | None, input_grad: Tensor | None) -> dict[bool, Tensor]:
    """What is to be sent, keyed by whether it is a gradient."""
    tensors = {False: output, True: input_grad}
    return {is_gradient: tensor for is_gradient, tensor in tensors.items() if tensor is not None}


def _exchange(
    output: Tensor | None,
    input_grad: Tensor | None,
    recv_prev: bool,
    recv_next: bool,
    shape: Shape | None,
    config: ModelParallelConfig,
) -> tuple[dict[bool, Tensor], Pending]:
    """Starts up to four transfers; what is received is keyed by whether it is a gradient.

    Raises:
        UsageError: no shape for what is received, and ``config.variable_seq_lengths`` is off.
    """
    outgoing = _by_kind(output, input_grad)
    messages = _messages(False in outgoing, True in outgoing, recv_prev, recv_next)
    sent = {m: as_sent(outgoing[m.gradient], config) for m in messages if m.send}
    to_come = [m.gradient for m in messages if not m.send]
    if config.variable_seq_lengths:
        places = [(m.peer, m.send) for m in messages]
        shapes = announce_shapes(list(sent.values()), places, config)
    elif shape is not None:
        shapes = [shape] * len(to_come)
    elif to_come:
        raise UsageError("receiving from another stage needs a tensor_shape, but got None: give its sizes")
    else:
        shapes = []
    received = {
        gradient: receive_buffer(shape, config) for gradient, shape in zip(to_come, shapes, strict=True)
    }
    transfers = [
        Transfer(sent[m] if m.send else received[m.gradient].detach(), m.peer, m.send) for m in messages
    ]
    return received, start(transfers, config)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def recv_forward(tensor_shape: Shape, config: ModelParallelConfig) -> Tensor | None:
    """Activations from the previous stage, None on the first."""
    if parallel_state.is_pipeline_first_stage():
        return None
    with timed(config, "forward-recv", log_level=2):
        received, pending = _exchange(None, None, True, False, tensor_shape, config)
        pending.wait()
    return received[False]


def recv_backward(tensor_shape: Shape, config: ModelParallelConfig) -> Tensor | None:
    """Gradients of this stage's output from the next stage, None on the last."""
    if parallel_state.is_pipeline_last_stage():
        return None
    with timed(config, "backward-recv", log_level=2):
        received, pending = _exchange(None, None, False, True, tensor_shape, config)
        pending.wait()
    return received[True]


def send_forward(output_tensor: Tensor | None, config: ModelParallelConfig) -> None:
    """Activations to the next stage; nothing on the last."""
    if not parallel_state.is_pipeline_last_stage():
        with timed(config, "forward-send", log_level=2):
            _exchange(output_tensor, None, False, False, None, config)[1].wait()


def send_backward(input_tensor_grad: Tensor | None, config: ModelParallelConfig) -> None:
    """Gradients to the previous stage; nothing on the first."""
    if not parallel_state.is_pipeline_first_stage():
        with timed(config, "backward-send", log_level=2):
            _exchange(None, input_tensor_grad, False, False, None, config)[1].wait()


def send_forward_recv_backward(
    output_tensor: Tensor | None, tensor_shape: Shape, config: ModelParallelConfig
) -> Tensor | None:
    """Both with the next stage at once; None on the last."""
    if parallel_state.is_pipeline_last_stage():
        return None
    with timed(config, "forward-send-backward-recv", log_level=2):
        received, pending = _exchange(output_tensor, None, False, True, tensor_shape, config)
        pending.wait()
    return received[True]


def send_backward_recv_forward(
    input_tensor_grad: Tensor | None, tensor_shape: Shape, config: ModelParallelConfig
) -> Tensor | None:
    """Both with the previous stage at once; None on the first."""
    if parallel_state.is_pipeline_first_stage():
        return None
    with timed(config, "backward-send-forward-recv", log_level=2):
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
    with timed(config, "forward-send-forward-recv", log_level=2):
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
    with timed(config, "backward-send-backward-recv", log_level=2):
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
    with timed(config, "forward-backward-send-forward-backward-recv", log_level=2):
        received, pending = _exchange(
            output_tensor, input_tensor_grad, recv_prev, recv_next, tensor_shape, config
        )
        pending.wait()
    return received.get(False), received.get(True)


def _communicate(
    *,
    tensor_send_next: Tensor | None,
    tensor_send_prev: Tensor | None,
    recv_prev: bool,
    recv_next: bool,
    tensor_shape: Shape,
    config: ModelParallelConfig,
    wait_on_reqs: bool = True,
) -> tuple[Tensor | None, Tensor | None, list[Pending] | None]:
    """Up to four transfers with both neighbours, cyclic: activations onwards, gradients back.

    Returns:
        (from the previous stage, from the next stage, None or, without ``wait_on_reqs``, what to ``wait()``
        for before they are used).
    """
    received, pending = _exchange(
        tensor_send_next, tensor_send_prev, recv_prev, recv_next, tensor_shape, config
    )
    if wait_on_reqs:
        pending.wait()
    return received.get(False), received.get(True), None if wait_on_reqs else [pending]


def _communicate_shapes(
    tensor_send_next: Tensor | None,
    tensor_send_prev: Tensor | None,
    recv_prev: bool,
    recv_next: bool,
    config: ModelParallelConfig,
) -> tuple[list[int], list[int]]:
    """Tells the neighbours the shapes of what they will get.

    Returns:
        Shapes of what the previous and the next stage are about to send; [0, 0, 0] where nothing comes.
    """
    outgoing = _by_kind(tensor_send_next, tensor_send_prev)
    messages = _messages(False in outgoing, True in outgoing, recv_prev, recv_next)
    sent = [outgoing[m.gradient] for m in messages if m.send]
    announced = iter(announce_shapes(sent, [(m.peer, m.send) for m in messages], config))
    shapes = {m.gradient: list(next(announced)) for m in messages if not m.send}
    return shapes.get(False, [0, 0, 0]), shapes.get(True, [0, 0, 0])


def _batched_p2p_ops(
    *,
    tensor_send_prev: Tensor | None,
    tensor_recv_prev: Tensor | None,
    tensor_send_next: Tensor | None,
    tensor_recv_next: Tensor | None,
    group: dist.ProcessGroup,
    prev_pipeline_rank: int,
    next_pipeline_rank: int,
) -> list[dist.Work]:
    """Starts the transfers whose tensor is not None in one call; neighbours are global ranks."""
    wanted = (
        (dist.isend, tensor_send_prev, prev_pipeline_rank),
        (dist.irecv, tensor_recv_prev, prev_pipeline_rank),
        (dist.isend, tensor_send_next, next_pipeline_rank),
        (dist.irecv, tensor_recv_next, next_pipeline_rank),
    )
    operations = [
        dist.P2POp(kind, tensor, peer, group) for kind, tensor, peer in wanted if tensor is not None
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def _p2p_ops(
    *,
    tensor_send_prev: Tensor | None,
    tensor_recv_prev: Tensor | None,
    tensor_send_next: Tensor | None,
    tensor_recv_next: Tensor | None,
    group: dist.ProcessGroup,
    prev_pipeline_rank: int,
    next_pipeline_rank: int,
) -> dict[str, dist.Work]:
    """:func:`_batched_p2p_ops` one by one: stages of even number send where those of odd number receive.

    Returns:
        What to wait for, by "send_next", "recv_prev", "send_prev" and "recv_next".
    """
    wanted = {
        "send_next": (dist.isend, tensor_send_next, next_pipeline_rank),
        "recv_prev": (dist.irecv, tensor_recv_prev, prev_pipeline_rank),
        "send_prev": (dist.isend, tensor_send_prev, prev_pipeline_rank),
        "recv_next": (dist.irecv, tensor_recv_next, next_pipeline_rank),
    }
    order = list(wanted)
    if parallel_state.get_pipeline_model_parallel_rank() % 2:
        order = ["recv_prev", "send_next", "recv_next", "send_prev"]
    calls = {name: wanted[name] for name in order if wanted[name][1] is not None}
    return {name: kind(tensor, peer, group=group) for name, (kind, tensor, peer) in calls.items()}
