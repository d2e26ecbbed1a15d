"""Per-token cross entropy that never holds a second copy of the logits in forward."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import accelerator, collectives
from megatron.core.accelerator import row_blocks
from megatron.core.errors import DataError
from megatron.core.overrides import overridable


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


# Names kept for other people's scripts: the steps of the split loss, and its form with an explicit group. The
# functions join what the ranks sum (target logits and sums of exponentials) in one tensor, for one reduction.


class VocabParallelCrossEntropy:
    """The steps of the split loss, for code that puts its own reductions between them."""

    @staticmethod
    def calculate_logits_max(vocab_parallel_logits: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 logits [..., v] and their maximum over this rank's ids [...]."""
        wide = vocab_parallel_logits.float()
        return wide, wide.amax(dim=-1)

    @staticmethod
    def calculate_predicted_logits(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        logits_max: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What this rank knows about the targets.

        Returns:
            mask of targets held elsewhere [...], flat local target ids, target logits (0 where masked)
            [...], sums of exponentials [...], exponentials [..., v]; logits are taken relative to
            ``logits_max``.
        """
        shifted = vocab_parallel_logits - logits_max.unsqueeze(-1)
        elsewhere = (target < vocab_start_index) | (target >= vocab_end_index)
        local = (target - vocab_start_index).masked_fill(elsewhere, 0)
        predicted = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = shifted.exp()
        return elsewhere, local.view(-1), predicted, exponentials.sum(dim=-1), exponentials

    @staticmethod
    def calculate_cross_entropy_loss(
        exp_logits: Tensor, predicted_logits: Tensor, sum_exp_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Softmax [..., v] and loss [...] from sums over all ranks."""
        return exp_logits / sum_exp_logits.unsqueeze(-1), sum_exp_logits.log() - predicted_logits

    @staticmethod
    def prepare_gradient_calculation_operands(
        softmax: Tensor, target_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(softmax, its 2-D view, row numbers, 1 where the target is local)."""
        grad_2d = softmax.view(-1, softmax.shape[-1])
        rows = torch.arange(grad_2d.shape[0], device=grad_2d.device)
        return softmax, grad_2d, rows, 1.0 - target_mask.view(-1).float()

    @staticmethod
    def calculate_gradients(
        grad_2d: Tensor,
        arange_1d: Tensor,
        masked_target_1d: Tensor,
        softmax_update: Tensor,
        grad_input: Tensor,
        grad_output: Tensor,
    ) -> Tensor:
        """(softmax - one-hot) * output gradient, written over the softmax."""
        grad_2d[arange_1d, masked_target_1d] -= softmax_update
        return grad_input.mul_(grad_output.unsqueeze(-1))


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def calculate_logits_max(vocab_parallel_logits: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 logits [..., v/TP] and their maximum over this rank's ids [...]."""
    return VocabParallelCrossEntropy.calculate_logits_max(vocab_parallel_logits)


def calculate_predicted_logits(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    logits_max: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What this rank knows about the targets.

    Returns:
        mask of targets held elsewhere [...], flat local target ids, target logits (0 where masked) over sums
        of exponentials [2, ...], exponentials [..., v/TP].
    """
    elsewhere, local, predicted, sums, exponentials = VocabParallelCrossEntropy.calculate_predicted_logits(
        vocab_parallel_logits, target, logits_max, vocab_start_index, vocab_end_index
    )
    return elsewhere, local, torch.stack((predicted, sums)), exponentials


def calculate_cross_entropy_loss(
    exp_logits: Tensor, predicted_logits_sum_exp_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax [..., v/TP] and loss [...] from sums over all ranks [2, ...]."""
    predicted, sums = predicted_logits_sum_exp_logits
    return VocabParallelCrossEntropy.calculate_cross_entropy_loss(exp_logits, predicted, sums)


def calculate_gradients(
    softmax: Tensor, grad_output: Tensor, target_mask: Tensor, masked_target_1d: Tensor
) -> Tensor:
    """(softmax - one-hot) * output gradient, written over the softmax."""
    steps = VocabParallelCrossEntropy
    grad, grad_2d, rows, update = steps.prepare_gradient_calculation_operands(softmax, target_mask)
    return steps.calculate_gradients(grad_2d, rows, masked_target_1d, update, grad, grad_output)


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: ProcessGroup | None
) -> Tensor:
    """Per-token loss, fp32.  logits: [s, b, v/TP], target: [s, b] -> [s, b].

    Gradients have the dtype of the logits.
    """
    return split_cross_entropy(vocab_parallel_logits, target, 0.0, tp_group)
