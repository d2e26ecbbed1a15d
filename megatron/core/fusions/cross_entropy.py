"""Per-token cross entropy that never holds a second copy of the logits in forward."""

from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.blocks import row_blocks
from megatron.core.overrides import overridable


@overridable
def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """``-log softmax(logits)[target]`` per token, in fp32 whatever the dtype of the logits.

    logits: [..., v], target: [...] -> [...] fp32. A negative target marks a token without loss and gradient.
    With smoothing e, the target's probability is ``1 - e'`` and every other id's ``e' / v`` more than 0,
    where e' = e v / (v - 1).

    Saves the logits and one number per token; backward makes the only other logits-sized tensor, the
    gradient.
    """
    return _CrossEntropy.apply(logits, target, label_smoothing)


def _smoothing(label_smoothing: float, columns: int) -> float:
    return label_smoothing * columns / (columns - 1) if label_smoothing else 0.0


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
        columns = logits.shape[-1]
        logits_2d, target_1d = logits.reshape(-1, columns), target.reshape(-1, 1)
        ignored = target_1d < 0
        target_1d = target_1d.masked_fill(ignored, 0)
        rows = logits_2d.shape[0]
        log_sum = torch.empty(rows, dtype=torch.float32, device=logits.device)
        picked = torch.empty_like(log_sum)
        mean = torch.empty_like(log_sum) if label_smoothing else None
        for block in row_blocks(rows, columns, logits.device):
            wide = logits_2d[block].float()
            torch.logsumexp(wide, dim=-1, out=log_sum[block])
            picked[block] = wide.gather(1, target_1d[block]).squeeze(1)
            if mean is not None:
                mean[block] = wide.mean(dim=-1)
        ctx.save_for_backward(logits_2d, target_1d, ignored, log_sum)
        ctx.smoothing, ctx.shape = _smoothing(label_smoothing, columns), logits.shape
        loss = log_sum - picked
        if mean is not None:
            # (1 - e') * (lse - picked) + e' * mean over ids of (lse - logit)
            loss.mul_(1.0 - ctx.smoothing).add_(log_sum - mean, alpha=ctx.smoothing)
        return loss.masked_fill_(ignored.squeeze(1), 0.0).view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        logits, target, ignored, log_sum = ctx.saved_tensors
        rows, columns = logits.shape
        scale = grad_loss.reshape(-1, 1).float().masked_fill(ignored, 0.0)
        grad = torch.empty_like(logits)
        for block in row_blocks(rows, columns, logits.device):
            # d loss / d logit = softmax - (1 - e') onehot - e'/v
            wide = logits[block].to(torch.float32, copy=True)
            wide.sub_(log_sum[block].unsqueeze(1)).exp_()
            if ctx.smoothing:
                wide.sub_(ctx.smoothing / columns)
            one_hot = torch.full_like(target[block], ctx.smoothing - 1.0, dtype=torch.float32)
            wide.scatter_add_(1, target[block], one_hot)
            torch.mul(wide, scale[block], out=grad[block])
        return grad.view(ctx.shape), None, None
