"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import torch.nn.functional as F
from torch import Tensor

from megatron.core.overrides import overridable


@overridable
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    x: [..., h], weight: [h] -> [..., h] in the dtype of ``weight``. The mean is fp32.
    """
    if x.dtype == weight.dtype:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(weight.dtype)
