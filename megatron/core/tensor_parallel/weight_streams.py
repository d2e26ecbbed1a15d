"""Random streams of initial weights: the same full weights however the model is cut.

Every weight is drawn whole from a stream that is a pure function of the base seed and of the weight's place
in the model, and then cut. Neither the number of tensor-parallel ranks nor the stage that holds a layer plays
a part, and the streams of dropout are not touched.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch

from megatron.core import accelerator


class _Scope:
    """A part of the model, and how many weights it has drawn."""

    def __init__(self, place: tuple[Any, ...], drawn: int = 0):
        self.place = place
        self.drawn = drawn


_SCOPE: ContextVar[_Scope | None] = ContextVar("weight_scope", default=None)


@contextlib.contextmanager
def weight_scope(*place: Any, drawn: int = 0) -> Iterator[None]:
    """Names the part of the model that is being built, as in ``weight_scope("decoder", 3)``.

    The weights inside are numbered in the order of construction, from ``drawn`` on, so that order must not
    depend on the layout.
    Scopes nest: the place of an inner one follows that of the outer one.
    """
    outer = _SCOPE.get()
    token = _SCOPE.set(_Scope((() if outer is None else outer.place) + place, drawn))
    try:
        yield
    finally:
        _SCOPE.reset(token)


class WeightStreams:
    """Seeds of the weights of one run.

    Weights made outside any scope are numbered over the process, apart for every pipeline stage.

    Args:
        seed: base seed, equal on all ranks (data-parallel ranks that initialise at random excepted).
        stage: pipeline stage of this process.
    """

    def __init__(self, seed: int, stage: int = 0):
        self.seed = seed
        self._outside = _Scope(("stage", stage))

    def next_seed(self) -> int:
        """Seed of the weight that is made now."""
        scope = _SCOPE.get() or self._outside
        place = repr((self.seed, scope.place, scope.drawn)).encode()
        scope.drawn += 1
        return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big") >> 1


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Context in which the default generator of ``device`` draws from ``seed``; then it goes on as before."""
    on_cpu = device.type == accelerator.CPU
    get_state, set_state, manual_seed = (
        (torch.get_rng_state, torch.set_rng_state, torch.default_generator.manual_seed)
        if on_cpu
        else (accelerator.get_rng_state, accelerator.set_rng_state, accelerator.manual_seed)
    )
    before = get_state()
    manual_seed(seed)
    try:
        yield
    finally:
        set_state(before)
