"""Lookup in an embedding table."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.overrides import overridable


@overridable
def embedding_lookup(ids: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table`` at ``ids``.  ids: [b, s], table: [V, h] -> [b, s, h].

    Gradients of ids that occur often are summed in fp32 and rounded once.
    """
    return _Lookup.apply(ids, table)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        return F.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        wide = grad.float() if ctx.dtype in (torch.float16, torch.bfloat16) else grad
        return None, torch.ops.aten.embedding_dense_backward(wide, ids, ctx.rows, -1, False).to(ctx.dtype)
