"""Activations that a flag or a user's config may name."""

import torch
import torch.nn.functional as F


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 (So et al. 2021, Primer)."""
    return torch.square(F.relu(x))


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), the cheap form of Hendrycks and Gimpel 2016, section 2."""
    return x * torch.sigmoid(1.702 * x)


def fast_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU through tanh: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), same reference."""
    return F.gelu(x, approximate="tanh")
