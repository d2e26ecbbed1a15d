"""The buffers of one model chunk: by types, and dense apart from expert parameters."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.collectives import group_size
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.errors import ConfigError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

_SMALLEST_BUCKET = 40_000_000
_BUCKET_PER_RANK = 1_000_000


@dataclass(frozen=True)
class ReductionGroups:
    """Ranks over which gradients are reduced; None for this one alone."""

    dense: dist.ProcessGroup | None = None
    expert: dist.ProcessGroup | None = None

    @classmethod
    def of_this_run(cls) -> "ReductionGroups":
        """Data x context ranks for dense parameters, the expert data-parallel ranks for experts."""
        if not parallel_state.is_initialized():
            return cls()
        return cls(
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_expert_data_parallel_group(),
        )


def gradient_scaling_factors(
    ddp_config: DistributedDataParallelConfig, per_token: bool, groups: ReductionGroups
) -> tuple[float, float]:
    """Factors of (dense, expert) gradients before they are summed, or averaged, over ranks.

    Every rank's loss is a mean, so gradients become a mean over all data x context ranks; experts too,
    though fewer ranks hold their gradients.

    Args:
        per_token: losses are sums, and gradients are divided by the number of tokens at the end.

    Raises:
        ConfigError: averaging, though sums are wanted.
    """
    if per_token and ddp_config.average_in_collective:
        raise ConfigError(
            "average_in_collective divides gradients by ranks, calculate_per_token_loss by tokens: leave "
            "one of the two out"
        )
    if per_token:
        return 1.0, 1.0
    ranks = group_size(groups.dense)
    if ddp_config.average_in_collective:
        return 1.0, group_size(groups.expert) / ranks
    return 1.0 / ranks, 1.0 / ranks


def choose_bucket_size(
    ddp_config: DistributedDataParallelConfig, disable_bucketing: bool, ranks: int
) -> int | None:
    """Elements that fill a bucket; None where a single bucket is best.

    Buckets pay where their reduction hides behind backward that goes on. On later pipeline stages and in
    later chunks backward ends early, and other stages' computation hides one large message better.
    """
    is_later_stage = parallel_state.is_initialized() and parallel_state.get_pipeline_model_parallel_rank() > 0
    if not ddp_config.overlap_grad_reduce or disable_bucketing or is_later_stage:
        return None
    return ddp_config.bucket_size or max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * ranks)


def build_buffers(
    params: Iterable[tuple[int, str, torch.nn.Parameter]],
    ddp_config: DistributedDataParallelConfig,
    group: dist.ProcessGroup | None,
    bucket_size: int | None,
    gradient_scaling_factor: float,
) -> list[_ParamAndGradBuffer]:
    """One buffer per pair of types, in order of first appearance.

    Args:
        params: (position in the model, name, parameter), in order of registration.
    """
    by_types: dict[tuple[torch.dtype, torch.dtype], list[tuple[int, str, torch.nn.Parameter]]] = {}
    for entry in params:
        dtype = entry[2].dtype
        grad_dtype = torch.float32 if ddp_config.grad_reduce_in_fp32 else dtype
        by_types.setdefault((dtype, grad_dtype), []).append(entry)
    buffers = []
    for (param_dtype, grad_dtype), members in by_types.items():
        buffers.append(
            _ParamAndGradBuffer(
                ddp_config,
                param_dtype,
                grad_dtype,
                [param for _, _, param in members],
                group,
                bucket_size,
                {param: name for _, name, param in members},
                gradient_scaling_factor,
                [index for index, _, _ in members],
            )
        )
        log_single_rank(
            logger,
            logging.INFO,
            "gradient buffer: %d elements of %s in %d bucket(s) for %d parameters of %s, reduced %s%s",
            buffers[-1].numel,
            _word(grad_dtype),
            len(buffers[-1].buckets),
            len(members),
            _word(param_dtype),
            "during backward" if ddp_config.overlap_grad_reduce else "after backward",
            ", optimizer state sharded" if ddp_config.use_distributed_optimizer else "",
        )
    return buffers


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
