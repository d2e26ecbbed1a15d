"""Cross entropy over an explicit tensor-parallel group."""

import torch.distributed as dist
from torch import Tensor

from megatron.core.errors import NotBuiltYetError
from megatron.core.fusions.cross_entropy import cross_entropy


def fused_vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor, target: Tensor, tp_group: dist.ProcessGroup | None
) -> Tensor:
    """Per-token loss, fp32.  logits: [s, b, v], target: [s, b] -> [s, b].

    Gradients have the dtype of the logits.

    Raises:
        NotBuiltYetError: the group has more than one rank.
    """
    if tp_group is not None and dist.get_world_size(tp_group) > 1:
        raise NotBuiltYetError("cross entropy over several tensor-parallel ranks")
    return cross_entropy(vocab_parallel_logits, target, 0.0)
