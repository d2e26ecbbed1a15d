"""Sending tensors between pipeline stages: several at once, waited for later.

Nothing here knows schedules. Backends differ in what they run at the same time (NCCL and HCCL run the
transfers of one communicator in order), so callers start matching transfers in matching order on both ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import accelerator, parallel_state
from megatron.core.enums import ModelType
from megatron.core.errors import NotBuiltYetError, UsageError

Shapes = list[tuple[int, ...]]
# Dimensions of the longest shape that can be announced.
_MAX_DIMS = 7


@dataclass(frozen=True)
class Transfer:
    """One tensor on its way to (``send``) or from pipeline rank ``peer``."""

    tensor: Tensor
    peer: int
    send: bool


class Pending:
    """Transfers that have been started.

    Args:
        transfers: held until they are done, so that their memory stays theirs.
        works: one per transfer, or fewer where the backend merged them.
        synchronize: make the whole device wait after receiving.
    """

    def __init__(self, transfers: Sequence[Transfer], works: Sequence[Any], synchronize: bool):
        merged = len(works) != len(transfers)
        pairs = list(zip(transfers, works, strict=False))
        self._receiving = list(works) if merged else [work for transfer, work in pairs if not transfer.send]
        self._sending = [] if merged else [work for transfer, work in pairs if transfer.send]
        self._held = list(transfers)
        self._synchronize = synchronize

    def wait_received(self) -> None:
        """Returns when everything to be received is there (on a device: before what is launched next)."""
        if not self._receiving:
            return
        for work in self._receiving:
            work.wait()
        self._receiving = []
        if self._synchronize:
            accelerator.synchronize()

    def wait(self) -> None:
        """Returns when everything is done."""
        self.wait_received()
        for work in self._sending:
            work.wait()
        self._sending, self._held = [], []

    def is_done(self) -> bool:
        """Whether everything has been sent and received."""
        return all(work.is_completed() for work in (*self._receiving, *self._sending))


def start(transfers: Sequence[Transfer], config: Any) -> Pending:
    """Starts transfers in the pipeline group, in the order given where the backend needs one.

    Args:
        transfers: contiguous tensors on the current device.
        config: ``batch_p2p_comm`` hands them to the backend in one call, ``batch_p2p_sync`` then makes the
            device wait for what is received.
    """
    if config.use_ring_exchange_p2p:
        raise NotBuiltYetError(
            "p2p by ring exchange",
            "use_ring_exchange_p2p",
            "Leave it out: it needs a special build of torch.",
        )
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    if config.batch_p2p_comm:
        operations = [
            dist.P2POp(dist.isend if t.send else dist.irecv, t.tensor, ranks[t.peer], group)
            for t in transfers
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
    else:
        works = [
            (dist.isend if t.send else dist.irecv)(t.tensor, ranks[t.peer], group=group) for t in transfers
        ]
    return Pending(transfers, works, synchronize=config.batch_p2p_comm and config.batch_p2p_sync)


def wire_dtype(config: Any) -> torch.dtype:
    """Type of all tensors between stages: ``pipeline_dtype``, or fp32 with a residual stream in fp32."""
    if getattr(config, "fp32_residual_connection", False):
        return torch.float32
    if config.pipeline_dtype is None:
        raise UsageError("pipeline_dtype is unset: set it in the model's config, usually to params_dtype")
    return config.pipeline_dtype


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


def receive_buffer(shape: Sequence[int], config: Any) -> Tensor:
    """Memory for a tensor from another stage, a leaf that collects a gradient."""
    return torch.empty(
        tuple(shape), dtype=wire_dtype(config), device=accelerator.current_device(), requires_grad=True
    )


def as_sent(tensor: Tensor, config: Any) -> Tensor:
    """The same data as the receiver expects it: contiguous, outside the graph, of the agreed type.

    Raises:
        UsageError: another type.
    """
    if tensor.dtype != wire_dtype(config):
        raise UsageError(
            f"a stage made a tensor of {tensor.dtype}, but stages agreed on {wire_dtype(config)}: set "
            "pipeline_dtype to the type of the model's activations"
        )
    return tensor.detach().contiguous()


def announce_shapes(
    outgoing: Sequence[Tensor], places: Sequence[tuple[int, bool]], config: Any
) -> list[tuple]:
    """Tells the receivers the shapes of ``outgoing``; returns the shapes of what is to come.

    Args:
        outgoing: tensors about to be sent, in order.
        places: (peer, send) of all transfers about to start, in order.

    Returns:
        Shapes of the tensors about to be received, in order.
    """
    device, waiting = accelerator.current_device(), iter(outgoing)
    transfers = []
    for peer, send in places:
        numbers = [0] * (1 + _MAX_DIMS)
        if send:
            shape = next(waiting).shape
            numbers[: 1 + len(shape)] = [len(shape), *shape]
        transfers.append(Transfer(torch.tensor(numbers, dtype=torch.int64, device=device), peer, send))
    start(transfers, config).wait()
    received = [transfer.tensor.tolist() for transfer in transfers if not transfer.send]
    return [tuple(numbers[1 : 1 + numbers[0]]) for numbers in received]
