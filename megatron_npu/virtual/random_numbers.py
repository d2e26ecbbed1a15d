"""Random numbers of a virtual NPU: a generator's state is a seed and an offset, as on a device.

Every draw moves the offset, so that saving and restoring the state replays draws. The first draw after a
seed gives the CPU's numbers for that seed; later ones are neither the CPU's nor Ascend's.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch import library as torch_library

from megatron_npu.virtual.host_memory import host

# Device offsets are multiples of four.
_STEP = 4


def host_generator(given: torch.Generator | None, device: torch.device | None) -> torch.Generator:
    """CPU generator for one draw of ``given``, or of the default generator of ``device``."""
    if given is not None and given.device.type == "cpu":
        return given
    seed, offset = _draw(given if given is not None else _default(device))
    mixed = (seed ^ (offset * 0x9E3779B97F4A7C15)) & ((1 << 63) - 1)
    return torch.Generator().manual_seed(mixed if offset else seed)


@contextlib.contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """Context in which the CPU's default generator is as ``generator``; then it goes on as before."""
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        torch.set_rng_state(before)


def install(library: torch_library.Library) -> None:
    """Lets dropout, inside attention too, draw from the device's generator."""
    from megatron_npu.virtual.kernels import attention

    library.impl("native_dropout", _dropout, "PrivateUse1")
    attention.Draw.next = staticmethod(_draw_for_attention)


def _default(device: torch.device | None) -> torch.Generator:
    index = device.index if device is not None else None
    return torch.npu.default_generators[torch.npu.current_device() if index is None else index]  # pyright: ignore[reportAttributeAccessIssue]


def _draw(generator: torch.Generator) -> tuple[int, int]:
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + _STEP)
    return seed, offset


def _draw_for_attention(keep_prob: float) -> tuple[int, int]:
    if keep_prob == 1.0:
        return 0, 0
    seed, offset = _draw(_default(None))
    return seed % (1 << 31), offset


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    mask = torch.ones_like(x, dtype=torch.bool)
    if train is False:
        return x.clone(), mask
    host(mask).bernoulli_(1 - p, generator=host_generator(None, x.device))
    return x * mask * (1.0 / (1.0 - p) if p < 1.0 else 0.0), mask
