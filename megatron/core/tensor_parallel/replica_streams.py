"""Random streams of one step, different on ranks that hold the same weights.

Data-parallel and context-parallel ranks compute with the same weights on other samples, or on other parts of
them, so each needs dropout masks of its own. Between steps their streams are equal: a checkpoint needs the
states of one rank only, and can be continued on any number of ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron.core import accelerator, parallel_state
from megatron.core.tensor_parallel.rng_tracker import RngSnapshot, get_cuda_rng_tracker


@contextlib.contextmanager
def replica_streams() -> Iterator[None]:
    """Gives every stream of this rank a seed made of its state and of the rank among the replicas.

    Afterwards the streams are where one draw would have brought them, whatever was drawn inside. Streams
    that are equal on two tensor-parallel ranks stay equal, since those have the same place among their
    replicas. Where there is one replica, nothing is changed and the streams go on as they are drawn from.
    """
    if _replicas() == 1:
        yield
        return
    shared = RngSnapshot.take()
    _draw_once_from_all(shared)
    after = RngSnapshot.take()
    _seed_for_replica(shared, parallel_state.get_data_parallel_rank(with_context_parallel=True))
    try:
        yield
    finally:
        after.restore()


def _replicas() -> int:
    if not parallel_state.is_initialized():
        return 1
    return parallel_state.get_data_parallel_world_size(with_context_parallel=True)


def _draw_once_from_all(shared: RngSnapshot) -> None:
    device = accelerator.current_device()
    tracker = get_cuda_rng_tracker()
    for name in shared.streams:
        with tracker.fork(name):
            torch.rand((), device=device)
    torch.rand(())
    if shared.device is not None:
        torch.rand((), device=device)


def _seed_for_replica(shared: RngSnapshot, replica: int) -> None:
    tracker = get_cuda_rng_tracker()
    for name, state in shared.streams.items():
        with tracker.fork(name):
            accelerator.manual_seed(_seed(name, state, replica))
    torch.default_generator.manual_seed(_seed("cpu", shared.cpu, replica))
    if shared.device is not None:
        accelerator.manual_seed(_seed("device", shared.device, replica))


def _seed(name: str, state: Tensor, replica: int) -> int:
    """A 62-bit number that differs, for all practical purposes, wherever an argument does.

    On accelerators a state is a seed and an offset, in host memory: reading it waits for nothing.
    """
    digest = hashlib.blake2b(state.cpu().numpy().tobytes(), digest_size=8)
    digest.update(repr((name, replica)).encode())
    return int.from_bytes(digest.digest(), "little") >> 2
