"""Cross entropy of logits that are split over tensor-parallel ranks along the vocabulary."""

import torch
from torch import Tensor

from megatron.core.fusions.cross_entropy import split_cross_entropy
from megatron.core.tensor_parallel.collectives import tensor_group


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


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Per-token loss, fp32, the same on all ranks.  logits: [s, b, v/TP], target: [s, b] -> [s, b].

    Label smoothing counts the whole vocabulary, so the loss does not depend on the number of ranks.
    """
    return split_cross_entropy(vocab_parallel_logits, target, label_smoothing, tensor_group())
