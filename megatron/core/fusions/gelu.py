"""GELU without a gate (Hendrycks and Gimpel, 2016)."""

import torch.nn.functional as F
from torch import Tensor

from megatron.core.overrides import overridable


@overridable
def gelu(x: Tensor, approximate: str) -> Tensor:
    """``x Phi(x)``, differentiable.  [..., f] -> [..., f]

    Replaceable because not every back end of torch computes the form that it is asked for.

    Args:
        x: input.
        approximate: ``"none"`` for the error function, ``"tanh"`` for the approximation.
    """
    return F.gelu(x, approximate=approximate)
