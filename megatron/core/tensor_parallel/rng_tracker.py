"""Named random streams of the device.

The word ``cuda`` in public names is history: everything acts on the active device, or on the CPU's generator
where there is no accelerator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core import accelerator
from megatron.core.errors import MegatronError
from megatron.core.tensor_parallel.weight_streams import WeightStreams

_MODEL_PARALLEL_RNG_TRACKER_NAME = "model-parallel-rng"
_EXPERT_PARALLEL_RNG_TRACKER_NAME = "expert-parallel-rng"
_DATA_PARALLEL_RNG_TRACKER_NAME = "data-parallel-rng"

# Distances of the streams' seeds from the base seed.
_MODEL_PARALLEL_OFFSET = 2718
_EXPERT_PARALLEL_OFFSET = 1024
_SEEDS_PER_EXPERT_RANK = 100


def get_expert_parallel_rng_tracker_name() -> str:
    """Name of the stream for expert weights."""
    return _EXPERT_PARALLEL_RNG_TRACKER_NAME


def get_data_parallel_rng_tracker_name() -> str:
    """Name of the stream that equals the default one at start."""
    return _DATA_PARALLEL_RNG_TRACKER_NAME


class RngStreamError(MegatronError):
    """A random stream that does not exist, or exists already."""


class CudaRNGStatesTracker:
    """Named random streams of the device.

    Args:
        use_cudagraphable_rng: accepted for callers' sake; the states are always plain tensors here.
        is_inference_rng_tracker: make ``add`` and ``fork`` do nothing (inference draws nothing).

    Attributes:
        weight_streams: seeds of initial weights, once :func:`model_parallel_cuda_manual_seed` has set them;
            no part of the states.
    """

    def __init__(self, use_cudagraphable_rng: bool = False, is_inference_rng_tracker: bool = False):
        self.use_cudagraphable_rng = use_cudagraphable_rng
        self.is_inference_rng_tracker = is_inference_rng_tracker
        self.reset()

    def is_initialized(self) -> bool:
        """True once a stream was added or loaded."""
        return bool(self.states_)

    def reset(self) -> None:
        """Forgets all streams."""
        self.states_: dict[str, Tensor] = {}
        self.seeds_: set[int] = set()
        self.weight_streams: WeightStreams | None = None

    def get_states(self) -> dict[str, Tensor]:
        """Name -> state.  The dict is a copy; a state tensor is replaced, never written to."""
        return dict(self.states_)

    def set_states(self, states: dict[str, Tensor]) -> None:
        """Replaces all streams."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Starts a stream; two streams may share neither name nor seed."""
        if self.is_inference_rng_tracker:
            return
        if seed in self.seeds_:
            raise RngStreamError(f"random stream {name!r}: seed {seed} is taken by another stream")
        if name in self.states_:
            raise RngStreamError(f"random stream {name!r} exists already; reset() the tracker first")
        self.seeds_.add(seed)
        before = accelerator.get_rng_state()
        accelerator.manual_seed(seed)
        self.states_[name] = accelerator.get_rng_state()
        accelerator.set_rng_state(before)

    @contextlib.contextmanager
    def fork(self, name: str = _MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        """Draws from the stream ``name`` inside the context, which leaves that stream advanced."""
        if self.is_inference_rng_tracker:
            yield
            return
        if name not in self.states_:
            raise RngStreamError(
                f"random stream {name!r} does not exist (there are: {sorted(self.states_) or 'none'}); "
                "call model_parallel_cuda_manual_seed(seed) first"
            )
        before = accelerator.get_rng_state()
        accelerator.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = accelerator.get_rng_state()
            accelerator.set_rng_state(before)


_tracker: CudaRNGStatesTracker | None = None


def initialize_rng_tracker(
    use_te_rng_tracker: bool = False,
    inference_rng_tracker: bool = False,
    use_cudagraphable_rng: bool = False,
) -> None:
    """Creates the tracker of this process, unless there is one.

    ``use_te_rng_tracker`` asks for TransformerEngine's class upstream; the streams are the same, so it
    changes nothing here.
    """
    global _tracker
    if _tracker is None:
        _tracker = CudaRNGStatesTracker(use_cudagraphable_rng, inference_rng_tracker)


def get_cuda_rng_tracker(
    use_te_rng_tracker: bool = False,
    inference_rng_tracker: bool = False,
    use_cudagraphable_rng: bool = False,
) -> CudaRNGStatesTracker:
    """The tracker of this process, created on demand."""
    initialize_rng_tracker(use_te_rng_tracker, inference_rng_tracker, use_cudagraphable_rng)
    assert _tracker is not None
    return _tracker


def get_all_rng_states() -> dict[str, Tensor]:
    """States of the process's tracker; empty while there is none."""
    return {} if _tracker is None else _tracker.get_states()


@dataclass(frozen=True)
class RngSnapshot:
    """All random state that a forward pass can draw from.

    Attributes:
        cpu: of the default generator of the CPU.
        device: of the device's default generator; None where the CPU is the device.
        streams: of the tracker, by name.
    """

    cpu: Tensor
    device: Tensor | None
    streams: dict[str, Tensor]

    @classmethod
    def take(cls) -> RngSnapshot:
        device = accelerator.get_rng_state() if accelerator.is_accelerated() else None
        return cls(torch.get_rng_state(), device, get_cuda_rng_tracker().get_states())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            accelerator.set_rng_state(self.device)
        get_cuda_rng_tracker().set_states(self.streams)

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Inside, random draws repeat those made since the snapshot; outside, nothing has changed."""
        now = RngSnapshot.take()
        self.restore()
        try:
            yield
        finally:
            now.restore()


def model_parallel_cuda_manual_seed(
    seed: int,
    te_rng_tracker: bool = False,
    inference_rng_tracker: bool = False,
    use_cudagraphable_rng: bool = False,
    weight_seed: int | None = None,
) -> None:
    """Seeds the device's default generator and the tracker's streams from one base seed.

    ======================  ====================================================
    default, data-parallel  ``seed``: equal on tensor-parallel ranks
    model-parallel          ``seed + 2718 + tp_rank``
    expert-parallel         ``seed + 1024 + 100 * ep_rank + expert_tp_rank``
    ======================  ====================================================

    Initial weights have streams of their own (``weight_streams``), made from ``weight_seed``: give the seed
    that all pipeline stages share; by default ``seed``.
    """
    from megatron.core import parallel_state

    tp_rank = ep_rank = expert_tp_rank = stage = 0
    if parallel_state.model_parallel_is_initialized():
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        ep_rank = parallel_state.get_expert_model_parallel_rank()
        expert_tp_rank = parallel_state.get_expert_tensor_parallel_rank()
        stage = parallel_state.get_pipeline_model_parallel_rank()
    tracker = get_cuda_rng_tracker(te_rng_tracker, inference_rng_tracker, use_cudagraphable_rng)
    tracker.reset()
    accelerator.manual_seed(seed)
    tracker.add(_DATA_PARALLEL_RNG_TRACKER_NAME, seed)
    tracker.add(_MODEL_PARALLEL_RNG_TRACKER_NAME, seed + _MODEL_PARALLEL_OFFSET + tp_rank)
    expert_seed = seed + _EXPERT_PARALLEL_OFFSET + _SEEDS_PER_EXPERT_RANK * ep_rank + expert_tp_rank
    tracker.add(_EXPERT_PARALLEL_RNG_TRACKER_NAME, expert_seed)
    tracker.weight_streams = WeightStreams(seed if weight_seed is None else weight_seed, stage)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _get_cuda_rng_state(
    device: int | str | torch.device = "cuda", clone: bool = False, graph_safe: bool = False
) -> Tensor:
    """State of the device's default generator, always a copy.

    A process has one device, so ``device`` is only what callers say; so are the other two.
    """
    return accelerator.get_rng_state()


def _set_cuda_rng_state(new_state: Tensor, device: int = -1, graph_safe: bool = False) -> None:
    """Puts back what :func:`_get_cuda_rng_state` returned."""
    accelerator.set_rng_state(new_state)
