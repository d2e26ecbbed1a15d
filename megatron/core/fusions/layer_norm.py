"""Layer normalisation."""

import torch.nn.functional as F
from torch import Tensor

from megatron.core.overrides import overridable


@overridable
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalises the last dimension to mean 0 and variance 1, then scales and shifts.

    x: [..., h], weight and bias: [h] -> [..., h] in the dtype of ``weight`` (an fp32 residual stream enters
    a bf16 layer here). Sums are fp32.
    """
    if x.dtype == weight.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps).to(weight.dtype)
