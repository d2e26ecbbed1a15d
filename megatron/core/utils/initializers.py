"""Weight initialisers: callables that fill a tensor in place and return it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

InitMethod = Callable[[Tensor], Tensor]


class _Normal:
    """Fills with N(0, std).  A class, not a closure, so that configs can be pickled and compared."""

    def __init__(self, std: float):
        self.std = std

    def __call__(self, tensor: Tensor) -> Tensor:
        return torch.nn.init.normal_(tensor, mean=0.0, std=self.std)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Normal) and other.std == self.std

    def __hash__(self) -> int:
        return hash(self.std)

    def __repr__(self) -> str:
        return f"normal(std={self.std:g})"


def init_method_normal(sigma: float) -> InitMethod:
    """Initialiser drawing from N(0, sigma)."""
    return _Normal(sigma)


def scaled_init_method_normal(sigma: float, num_layers: int, multiplier: float = 2.0) -> InitMethod:
    """Initialiser drawing from N(0, sigma / sqrt(multiplier * num_layers)).

    For the layers that write into the residual stream, of which there are ``multiplier`` per layer, so that
    the stream's variance does not grow with depth (GPT-2 report, section 2.3).
    """
    return _Normal(sigma / math.sqrt(multiplier * num_layers))


def xavier_uniform_init_method(tensor: Tensor) -> Tensor:
    """Fills with U(-a, a), a = sqrt(6 / (fan in + fan out))."""
    return torch.nn.init.xavier_uniform_(tensor)
