"""Per-token cross entropy of whole rows of logits."""

import torch
from torch import Tensor

from megatron_npu import chip
from megatron_npu.registry import replaces

_IGNORED = -100
_MOST_ROWS = 200_000


def _unsuitable(logits: Tensor, target: Tensor, label_smoothing: float) -> str | None:
    if label_smoothing:
        return "label smoothing"
    return f"more than {_MOST_ROWS} tokens" if target.numel() > _MOST_ROWS else None


@replaces(
    "megatron.core.fusions.fused_cross_entropy.cross_entropy",
    operators=("npu_cross_entropy_loss",),
    since="7.0.0",
    chips=chip.FROM_910B,
    dtypes=(torch.float32,),
    unless=_unsuitable,
    limits=f"half-precision logits, label smoothing, more than {_MOST_ROWS} tokens",
    bound={torch.float32: 1e-5},
    note="the operator rounds the loss to the type of the logits, so only fp32 logits go there",
)
def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Keeps the log-probabilities in place of the logits; one id stands for every token without loss."""
    rows, ids = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    ids = ids.masked_fill(ids < 0, _IGNORED)
    loss = torch.ops.npu.npu_cross_entropy_loss(rows, ids, None, "none", _IGNORED)[0]
    return loss.view(target.shape)
