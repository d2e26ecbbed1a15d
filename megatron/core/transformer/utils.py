"""Masks, activations and other small parts of transformer layers."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron import unbuilt
from megatron.core.fusions.attention_masks import get_default_causal_mask  # noqa: F401  (also importable from here)
from megatron.core.fusions.fused_softmax import MASKED_SCORE

__getattr__ = unbuilt.names_of(__name__)


def attention_mask_func(attention_scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Fills masked scores with -10000, in place."""
    return attention_scores.masked_fill_(attention_mask, MASKED_SCORE)


def gelu_impl(x: Tensor) -> Tensor:
    """Tanh form of GELU."""
    return F.gelu(x, approximate="tanh")


def openai_gelu(x: Tensor) -> Tensor:
    """Tanh form of GELU."""
    return gelu_impl(x)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def get_linear_layer(
    rows: int, columns: int, init_method: Callable[[Tensor], object], perform_initialization: bool = True
) -> torch.nn.Linear:
    """``nn.Linear(rows, columns)`` with a drawn weight and a zero bias."""
    layer = torch.nn.Linear(rows, columns)
    if perform_initialization:
        init_method(layer.weight)
    with torch.no_grad():
        layer.bias.zero_()
    return layer


def erf_gelu(x: Tensor) -> Tensor:
    """Exact GELU, ``x/2 (1 + erf(x / sqrt 2))``, in the dtype of ``x``."""
    return (x * 0.5 * (torch.erf(x / math.sqrt(2.0)) + 1.0)).to(x.dtype)
