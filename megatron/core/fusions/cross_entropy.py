"""Per-token cross entropy that never holds a second copy of the logits in forward."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import accelerator
from megatron.core.errors import DataError
from megatron.core.fusions.blocks import row_blocks
from megatron.core.overrides import overridable
from megatron.core.tensor_parallel import collectives


@overridable
def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """``-log softmax(logits)[target]`` per token, in fp32 (in fp64 of fp64 logits).

    logits: [..., v], target: [...] -> [...]. A negative target marks a token without loss and gradient.
    With smoothing e, the target's probability is ``1 - e'`` and every other id's ``e' / v`` more than 0,
    where e' = e v / (v - 1).

    Saves the logits and one number per token; backward makes the only other logits-sized tensor, the
    gradient.
    """
    return _CrossEntropy.apply(logits, target, label_smoothing, None)


def split_cross_entropy(
    logits: Tensor, target: Tensor, label_smoothing: float, group: ProcessGroup | None
) -> Tensor:
    """The same of logits split over the ranks of ``group`` along the vocabulary: the same numbers, too.

    logits: [..., v/ranks], target: [...] ids of the whole vocabulary -> [...]. The ranks exchange the
    largest log-sum of a token, then its sums; v counts the whole vocabulary in label smoothing as well.

    Raises:
        DataError: a target beyond the vocabulary (found on a CPU only, where looking is free).
    """
    if collectives.group_size(group) == 1:
        return cross_entropy(logits, target, label_smoothing)
    return _CrossEntropy.apply(logits, target, label_smoothing, group)


def _smoothing(label_smoothing: float, columns: int) -> float:
    return label_smoothing * columns / (columns - 1) if label_smoothing else 0.0


class _CrossEntropy(torch.autograd.Function):
    """Over the columns held here, and with a group over those of the other ranks."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, label_smoothing: float, group: ProcessGroup | None
    ) -> Tensor:
        columns = logits.shape[-1]
        all_columns = columns * collectives.group_size(group)
        logits_2d, target_1d = logits.reshape(-1, columns), target.reshape(-1, 1)
        ignored = target_1d < 0
        elsewhere = ignored
        if group is not None:
            target_1d, elsewhere = _localize(target_1d, columns, all_columns, collectives.group_rank(group))
        target_1d = target_1d.masked_fill(elsewhere, 0)
        log_sum, picked, mean = _row_sums(logits_2d, target_1d, label_smoothing > 0)
        if group is not None:
            picked.masked_fill_(elsewhere.squeeze(1), 0.0)
            log_sum, picked, mean = _join(log_sum, picked, mean, group)
        ctx.save_for_backward(logits_2d, target_1d, ignored, elsewhere, log_sum)
        ctx.smoothing, ctx.shape = _smoothing(label_smoothing, all_columns), logits.shape
        ctx.all_columns = all_columns
        loss = log_sum - picked
        if mean is not None:
            # (1 - e') * (lse - picked) + e' * mean over ids of (lse - logit)
            loss.mul_(1.0 - ctx.smoothing).add_(log_sum - mean, alpha=ctx.smoothing)
        return loss.masked_fill_(ignored.squeeze(1), 0.0).view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        logits, target, ignored, elsewhere, log_sum = ctx.saved_tensors
        rows, columns = logits.shape
        scale = grad_loss.reshape(-1, 1).to(log_sum.dtype).masked_fill(ignored, 0.0)
        # One minus the smoothing, where the target is a column held here
        one_hot = torch.full_like(scale, ctx.smoothing - 1.0).masked_fill_(elsewhere, 0.0)
        grad = torch.empty_like(logits)
        for block in row_blocks(rows, columns, logits.device):
            # d loss / d logit = softmax - (1 - e') onehot - e'/v
            wide = logits[block].to(log_sum.dtype, copy=True)
            wide.sub_(log_sum[block].unsqueeze(1)).exp_()
            if ctx.smoothing:
                wide.sub_(ctx.smoothing / ctx.all_columns)
            wide.scatter_add_(1, target[block], one_hot[block])
            torch.mul(wide, scale[block], out=grad[block])
        return grad.view(ctx.shape), None, None, None


def _row_sums(logits: Tensor, target: Tensor, with_mean: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Per row of [rows, columns]: log of the sum of exponentials, target logit, mean logit.  3 x [rows]"""
    rows, columns = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_sum = torch.empty(rows, dtype=dtype, device=logits.device)
    picked = torch.empty_like(log_sum)
    mean = torch.empty_like(log_sum) if with_mean else None
    for block in row_blocks(rows, columns, logits.device):
        wide = logits[block].to(dtype)
        torch.logsumexp(wide, dim=-1, out=log_sum[block])
        picked[block] = wide.gather(1, target[block]).squeeze(1)
        if mean is not None:
            mean[block] = wide.mean(dim=-1)
    return log_sum, picked, mean


def _localize(target: Tensor, columns: int, all_columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """Targets counted from this rank's first column, and True where they are not among its columns."""
    if target.device.type == accelerator.CPU and target.numel() and target.max() >= all_columns:
        raise DataError(
            f"target id {int(target.max())} is beyond the {all_columns} logits: the data was made with "
            "another tokenizer than this model's"
        )
    local = target - rank * columns
    return local, (local < 0) | (local >= columns) | (target < 0)


def _join(
    log_sum: Tensor, picked: Tensor, mean: Tensor | None, group: ProcessGroup
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows' figures over all ranks' columns, from those over each rank's.  Two exchanges."""
    largest = log_sum.clone()
    collectives.all_reduce(largest, group, torch.distributed.ReduceOp.MAX)
    parts = [(log_sum - largest).exp_(), picked]
    if mean is not None:
        parts.append(mean / collectives.group_size(group))
    sums = torch.stack(parts)
    collectives.all_reduce(sums, group)
    return sums[0].log().add_(largest), sums[1], None if mean is None else sums[2]
