"""The weight gradient of a linear layer, added to the gradients of earlier micro-batches."""

from torch import Tensor

from megatron.core import accelerator
from megatron.core.overrides import overridable


@overridable
def accumulate_weight_gradient(main_grad: Tensor, grad_output: Tensor, x: Tensor) -> None:
    """``main_grad += grad_output^T x``, in place.

    main_grad: [out, in], usually fp32; grad_output: [tokens, out]; x: [tokens, in]. The product is rounded
    to the dtype of ``x`` before it is added, so that accumulating here or after the backward pass gives the
    same bits.
    """
    main_grad.add_(weight_gradient(grad_output, x))


def weight_gradient(grad_output: Tensor, x: Tensor) -> Tensor:
    """``grad_output^T x``.  [tokens, out], [tokens, in] -> [out, in], in the dtype of ``x``."""
    compute = accelerator.matmul_compute_dtype(x.dtype, x.device)
    return grad_output.to(compute).t().matmul(x.to(compute)).to(x.dtype)
