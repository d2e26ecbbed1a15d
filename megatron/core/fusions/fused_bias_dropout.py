"""The end of a sub-layer: add its bias, drop out, add the residual."""

from collections.abc import Callable

from torch import Tensor

from megatron.core.fusions.dropout import dropout
from megatron.core.overrides import overridable

BiasDropoutAdd = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]


@overridable
def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, p: float, training: bool) -> Tensor:
    """``residual + dropout(x + bias)``.  x, residual: [s, b, h], bias: [h] or None -> [s, b, h].

    The result has the wider dtype of ``x`` and ``residual``.
    """
    out = x if bias is None else x + bias
    if training and p > 0.0:
        out = dropout(out, p)
    return residual + out


def bias_dropout_add_unfused(training: bool) -> BiasDropoutAdd:
    """A function ``(x_with_bias, residual, probability)``, training or not."""
    return bias_dropout_add_fused_train if training else bias_dropout_add_fused_inference


def bias_dropout_add_fused_train(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
) -> Tensor:
    """``residual + dropout(x + bias)``."""
    return bias_dropout_add(*x_with_bias, residual, prob, True)


def bias_dropout_add_fused_inference(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float
) -> Tensor:
    """``residual + x + bias``."""
    return bias_dropout_add(*x_with_bias, residual, prob, False)


def get_bias_dropout_add(training: bool, fused: bool) -> BiasDropoutAdd:
    """What a layer's ``bda`` slot holds; ``fused`` changes nothing here, for one function serves both."""
    return bias_dropout_add_unfused(training)
