"""Contiguous gradient (and, for the distributed optimizer, parameter) buffers, cut into buckets."""

import enum
import logging

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.collectives import (  # noqa: F401  (also importable from here)
    dist_all_gather_func,
    dist_reduce_scatter_func,
)
from megatron.core.distributed.bucket_group import _ParamAndGradBucketGroup, partition_buckets, shard_buffer
from megatron.core.distributed.buffer_layout import Alignment, lay_out, sharded_alignment
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig

__all__ = [
    "BufferType",
    "_ParamAndGradBucket",
    "_ParamAndGradBucketGroup",
    "_ParamAndGradBuffer",
    "partition_buckets",
    "shard_buffer",
]

logger = logging.getLogger(__name__)


class BufferType(enum.Enum):
    """Which of a buffer's two tensors is meant."""

    PARAM = 1
    GRAD = 2


class _ParamAndGradBucket:
    """A slice of a buffer that is reduced, and gathered, at once.

    Args:
        params: parameters in it.
        param_data: their values (with the distributed optimizer), padding included, or None.
        grad_data: their gradients, padding included.
        offset: element of the buffer at which the bucket starts.
        numel_unpadded: elements without the padding at its end.
        gradient_scaling_factor: factor of the gradients before they are summed over ranks.
        bucket_id: number within the buffer.
    """

    def __init__(
        self,
        params: list[torch.nn.Parameter],
        param_data: Tensor | None,
        grad_data: Tensor,
        offset: int,
        numel_unpadded: int,
        gradient_scaling_factor: float,
        bucket_id: int,
    ):
        self.params_list = list(params)
        self.params = set(params)
        self.param_data = param_data
        self.grad_data = grad_data
        self.offset = offset
        self.numel_unpadded = numel_unpadded
        self.gradient_scaling_factor = gradient_scaling_factor
        self.bucket_id = bucket_id


class _ParamAndGradBuffer:
    """Gradients of ``params`` in one tensor, in REVERSED order: backward fills it roughly from its start.

    Every parameter gets an attribute ``main_grad``, its view into the buffer. With the distributed optimizer
    the parameters themselves move into a buffer of the same layout, too.

    Args:
        ddp_config: settings.
        param_dtype: type of the parameters.
        grad_dtype: type of the gradients.
        params: in the order of registration, all on one device.
        data_parallel_group: ranks that reduce the buffer; None for this one alone.
        bucket_size: elements that fill a bucket; None for a single bucket.
        param_to_name: names for messages.
        gradient_scaling_factor: factor of the gradients before they are summed over ranks.
        param_indices: positions of ``params`` among all parameters of the model.

    Attributes:
        params: in the order of the buffer.
        grad_data, param_data: [numel]; ``param_data`` is None without the distributed optimizer.
        param_index_map: where each parameter lies: (start, end, number of its bucket).
        buckets: in the order of the buffer.
        numel_unpadded: elements without the padding at the ends of buckets.
    """

    def __init__(
        self,
        ddp_config: DistributedDataParallelConfig,
        param_dtype: torch.dtype,
        grad_dtype: torch.dtype,
        params: list[torch.nn.Parameter],
        data_parallel_group: dist.ProcessGroup | None,
        bucket_size: int | None,
        param_to_name: dict[torch.nn.Parameter, str],
        gradient_scaling_factor: float,
        param_indices: list[int],
    ):
        self.ddp_config = ddp_config
        self.param_dtype, self.grad_dtype = param_dtype, grad_dtype
        self.params = list(reversed(params))
        self.param_indices = list(reversed(param_indices))
        self.param_to_name = param_to_name
        self.data_parallel_group = data_parallel_group
        self.data_parallel_world_size = 1 if data_parallel_group is None else data_parallel_group.size()
        self.gradient_scaling_factor = gradient_scaling_factor

        sharded = ddp_config.use_distributed_optimizer
        layout = lay_out(
            [param.numel() for param in self.params],
            # Both copies of a tied embedding must be cut into shards alike: their gradients are summed.
            [sharded and getattr(param, "shared_embedding", False) for param in self.params],
            bucket_size,
            sharded_alignment(self.data_parallel_world_size, ddp_config.pad_buckets_for_high_nccl_busbw)
            if sharded
            else Alignment(),
        )
        self.numel, self.numel_unpadded = layout.numel, layout.numel_unpadded
        self.param_index_map = dict(zip(self.params, layout.params, strict=True))
        device = params[0].device
        self.grad_data = torch.zeros(self.numel, dtype=grad_dtype, device=device)
        self.param_data = torch.zeros(self.numel, dtype=param_dtype, device=device) if sharded else None
        self._hand_out_views()
        self.buckets = [
            _ParamAndGradBucket(
                [self.params[index] for index in place.members],
                self.param_data[place.start : place.end] if sharded else None,
                self.grad_data[place.start : place.end],
                place.start,
                place.numel_unpadded,
                gradient_scaling_factor,
                number,
            )
            for number, place in enumerate(layout.buckets)
        ]

    def _hand_out_views(self) -> None:
        for param, (start, end, _) in self.param_index_map.items():
            param.main_grad = self.grad_data[start:end].view(param.shape)
            if self.param_data is not None:
                own = self.param_data[start:end].view(param.shape)
                own.copy_(param.data)
                param.data = own

    def reset(self) -> None:
        """Sets all gradients to zero."""
        self.grad_data.zero_()

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiplies all gradients by a number or a 0-dim tensor."""
        self.grad_data.mul_(scaling_factor)
