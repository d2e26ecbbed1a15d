"""Logging from one rank of many."""

import logging
from typing import Any

import torch.distributed as dist


def log_single_rank(logger: logging.Logger, *args: Any, rank: int = 0, **kwargs: Any) -> None:
    """``logger.log(*args, **kwargs)`` on one global rank only, or always without process groups."""
    if not dist.is_initialized() or dist.get_rank() == rank:
        logger.log(*args, **kwargs)


def log_on_each_pipeline_stage(logger: logging.Logger, *args: Any, **kwargs: Any) -> None:
    """``logger.log`` on one rank per pipeline stage: that with data- and tensor-parallel rank 0."""
    from megatron.core import parallel_state

    if not dist.is_initialized() or (
        parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0
    ):
        logger.log(*args, **kwargs)
