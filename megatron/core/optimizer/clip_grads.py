"""Statistics of gradients over all ranks of a model: norm, clipping, and the count of zeros."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import accelerator, parallel_state
from megatron.core.fusions.multi_tensor import count_zeros, l2_norm, scale_gradients


def get_grad_norm_fp32(
    grads_for_norm: Sequence[Tensor] | Tensor,
    norm_type: int | float = 2,
    grad_stats_parallel_group: dist.ProcessGroup | None = None,
) -> float:
    """Norm over all values of the gradients on all ranks of the group.

    Args:
        grads_for_norm: gradients of this rank, each counted on one rank only.
        norm_type: order p of the norm; ``inf`` for the largest magnitude.
        grad_stats_parallel_group: ranks to add up; None for this one alone.
    """
    grads = [grads_for_norm] if isinstance(grads_for_norm, Tensor) else list(grads_for_norm)
    order = float(norm_type)
    if not grads:
        norm = torch.zeros((), dtype=torch.float32, device=accelerator.current_device())
    elif order == 2.0:
        norm = l2_norm(grads)
    else:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, order)), order)
    if is_alone(grad_stats_parallel_group):
        return norm.item()
    if order == float("inf"):
        return reduce_over(norm, dist.ReduceOp.MAX, grad_stats_parallel_group).item()
    return reduce_over(norm**order, dist.ReduceOp.SUM, grad_stats_parallel_group).item() ** (1.0 / order)


def clip_grad_by_total_norm_fp32(
    parameters: Sequence[Tensor] | Tensor,
    max_norm: int | float,
    total_norm: float,
    use_decoupled_grad: bool = False,
) -> None:
    """Multiplies the gradients of ``parameters`` by max_norm / (total_norm + 1e-6) where that is below 1.

    With ``use_decoupled_grad`` a parameter's gradient is its attribute ``decoupled_grad`` instead of
    ``grad``.
    """
    factor = max_norm / (total_norm + 1.0e-6)
    if factor < 1.0:
        scale_gradients(_gradients(parameters, use_decoupled_grad), factor)


def count_zeros_fp32(
    parameters: Sequence[Tensor] | Tensor,
    grad_stats_parallel_group: dist.ProcessGroup | None,
    use_decoupled_grad: bool = False,
) -> float:
    """Exact zeros among the gradients on all ranks of the group; shared and replicated tensors count once."""
    listed = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = _gradients([param for param in listed if counts_once(param)], use_decoupled_grad)
    zeros = count_zeros(grads) if grads else torch.zeros((), device=accelerator.current_device())
    return reduce_over(zeros.float(), dist.ReduceOp.SUM, grad_stats_parallel_group).item()


def counts_once(param: Tensor) -> bool:
    """True where ``param`` counts: of tied copies the first, of tensor-parallel replicas rank 0's."""
    return not getattr(param, "shared", False) and not _is_tensor_parallel_duplicate(param)


def _is_tensor_parallel_duplicate(param: Tensor) -> bool:
    if getattr(param, "tensor_model_parallel", False) or not parallel_state.model_parallel_is_initialized():
        return False
    return parallel_state.get_tensor_model_parallel_rank() != 0


def is_alone(group: dist.ProcessGroup | None) -> bool:
    """True when there is no other rank to add up with."""
    return group is None or dist.get_world_size(group) == 1


def reduce_over(value: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    """``value`` all-reduced over ``group`` in place; untouched when there is no other rank."""
    if not is_alone(group):
        dist.all_reduce(value, op=op, group=group)
    return value


def _gradients(parameters: Iterable[Tensor] | Tensor, use_decoupled_grad: bool) -> list[Tensor]:
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    listed = [parameters] if isinstance(parameters, Tensor) else parameters
    grads = (getattr(param, name, None) for param in listed)
    return [grad for grad in grads if grad is not None]
