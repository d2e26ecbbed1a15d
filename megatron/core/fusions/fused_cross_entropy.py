"""Cross entropy over an explicit tensor-parallel group, and its steps under the names of the fused form.

The steps join what the ranks sum (target logits and sums of exponentials) in one tensor, so that one
reduction does.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.fusions.cross_entropy import split_cross_entropy
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy


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
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """Per-token loss, fp32.  logits: [s, b, v/TP], target: [s, b] -> [s, b].

    Gradients have the dtype of the logits.
    """
    return split_cross_entropy(vocab_parallel_logits, target, 0.0, tp_group)
