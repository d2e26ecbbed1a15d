"""Contiguous gradient (and, for the distributed optimizer, parameter) buffers, cut into buckets.

Groups of buckets reduce gradients and gather parameters, at once or behind the computation.
"""

import enum
import functools
import logging
from collections.abc import Iterable
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import collectives
from megatron.core.collectives import (  # noqa: F401  (also importable from here)
    dist_all_gather_func,
    dist_reduce_scatter_func,
)
from megatron.core.distributed.buffer_layout import Alignment, lay_out, sharded_alignment
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.errors import UsageError
from megatron.core.fusions.multi_tensor import l2_norm
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils.tensors import mark

logger = logging.getLogger(__name__)

# A gradient of this many times the usual norm is worth a warning.
_LARGE_GRAD_FACTOR = 10
# Parameters named in a message.
_MOST_NAMES = 5


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
                None if self.param_data is None else self.param_data[place.start : place.end],
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
            mark(param, main_grad=self.grad_data[start:end].view(param.shape))
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


def shard_buffer(buffer: Tensor, data_parallel_world_size: int) -> list[Tensor]:
    """Equal slices of a flat buffer, one per rank: views."""
    if buffer.numel() % data_parallel_world_size:
        raise UsageError(f"{buffer.numel()} elements do not divide into {data_parallel_world_size} shards")
    return list(buffer.split(buffer.numel() // data_parallel_world_size))


class _ParamAndGradBucketGroup:
    """Buckets that are reduced and gathered together, over one process group.

    Groups of one model chunk form a chain in the order in which backward completes them. With
    ``overlap_grad_reduce`` a group starts to reduce when its last gradient arrives and the group before it
    has started: so all ranks start their collectives in one order, whatever the order of arrival. Parameters
    are gathered from the end of the chain to its start, the order of forward.

    Args:
        buckets: one or more.
        ddp_config: settings.
        collective_group: ranks that share the gradients; None for this one alone.
        collective_group_size: number of them.
    """

    def __init__(
        self,
        buckets: list[_ParamAndGradBucket],
        ddp_config: DistributedDataParallelConfig,
        collective_group: dist.ProcessGroup | None,
        collective_group_size: int,
    ):
        self.buckets = buckets
        self.ddp_config = ddp_config
        self.collective_group = collective_group
        self.collective_group_size = collective_group_size
        self._rank = 0 if collective_group is None else collective_group.rank()
        self.params = {param for bucket in buckets for param in bucket.params}
        self.is_last_microbatch = True
        self.previous_group: _ParamAndGradBucketGroup | None = None
        self.next_group: _ParamAndGradBucketGroup | None = None
        # Whose parameters forward needs after these.
        self.next_param_gather_bucket_group: _ParamAndGradBucketGroup | None = None
        self._arrived: set[torch.nn.Parameter] = set()
        # Collectives under way; None: not started.
        self._reductions: list[dist.Work | None] | None = None
        self._gathers: list[dist.Work | None] | None = None
        # Norms of this rank's gradients that nobody has looked at yet.
        self._norms: list[Tensor] = []
        self._params_changed = False

    # --- gradients ------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets which gradients arrived, for a new step; waits for a reduction that nobody waited for."""
        _wait(self._reductions)
        self._reductions = None
        self._norms = []
        self._arrived.clear()
        self.is_last_microbatch = True

    def register_grad_ready(self, param: torch.nn.Parameter) -> None:
        """Notes that backward has finished ``param``'s gradient; a group's last one starts its reduction.

        Counts in the last micro-batch only.

        Raises:
            UsageError: nothing is reduced behind backward; the parameter is not of this group; or its
                gradient arrived before in this step, so that a reduction may have missed some of it.
        """
        if not self.ddp_config.overlap_grad_reduce:
            raise UsageError(
                "register_grad_ready() counts gradients that are reduced behind backward: set "
                "overlap_grad_reduce, or leave the call out"
            )
        if param not in self.params:
            raise UsageError(f"a parameter of shape {list(param.shape)} is not of this bucket group")
        if (self.is_last_microbatch and param in self._arrived) or self._reductions is not None:
            raise UsageError(
                f"a gradient of shape {list(param.shape)} arrived twice in the last micro-batch of a step, "
                "while gradients are reduced behind backward: run all micro-batches but the last inside "
                "no_sync(), or leave overlap_grad_reduce out"
            )
        if not self.is_last_microbatch:
            return
        self._arrived.add(param)
        group: _ParamAndGradBucketGroup | None = self
        while group is not None and group._may_start():
            group.start_grad_sync()
            group = group.next_group

    def _may_start(self) -> bool:
        in_turn = self.previous_group is None or self.previous_group._reductions is not None
        return in_turn and self._reductions is None and len(self._arrived) == len(self.params)

    def missing_params(self) -> list[torch.nn.Parameter]:
        """Parameters without whose gradients nobody may finish: a reduction behind backward waits for them.

        Empty once the reduction has started, by the last gradient or by a call.
        """
        if not self.ddp_config.overlap_grad_reduce or self._reductions is not None:
            return []
        return [
            param for bucket in self.buckets for param in bucket.params_list if param not in self._arrived
        ]

    def start_grad_sync(self) -> None:
        """Starts to reduce the gradients, also where some are missing; nothing if that is under way.

        Without ``overlap_grad_reduce`` they are checked as configured, and reduced when this returns. With it
        they are checked by :meth:`finish_grad_sync`: here backward would wait for the device at every group.

        Raises:
            TrainingError: NaN or Inf among them, if that is to be checked.
        """
        if self._reductions is not None:
            return
        if self.ddp_config.check_for_nan_in_grad or self.ddp_config.check_for_large_grads:
            if self.ddp_config.overlap_grad_reduce:
                self._norms = self._local_norms()
            else:
                self.check_grads(self.ddp_config.check_for_nan_in_grad, self.ddp_config.check_for_large_grads)
        self._reductions = []
        for bucket in self.buckets:
            if bucket.gradient_scaling_factor != 1.0:
                bucket.grad_data.mul_(bucket.gradient_scaling_factor)
            if self.collective_group_size > 1:
                self._reductions.append(self._reduce(bucket))
        if not self.ddp_config.overlap_grad_reduce:
            _wait(self._reductions)

    def finish_grad_sync(self) -> None:
        """Waits until the gradients are reduced; starts that if nobody did.

        Raises:
            TrainingError: NaN or Inf among this rank's, if that is to be checked.
            UsageError: with ``overlap_grad_reduce``, gradients are still missing; nothing has been done then.
        """
        missing = self.missing_params()
        if missing:
            raise missing_gradients([f"a parameter of shape {list(param.shape)}" for param in missing])
        self.start_grad_sync()
        self._check_norms()
        self.reset()

    def check_grads(self, check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        """Looks at the L2 norm of each bucket.

        Raises:
            TrainingError: it is NaN or Inf, if that is to be checked.
        """
        self._check(self._local_norms(), check_for_nan_or_inf, check_for_large)

    def _local_norms(self) -> list[Tensor]:
        """Of each bucket before it is reduced: 0-dim, on the device."""
        return [l2_norm([bucket.grad_data]) for bucket in self.buckets]

    def _check_norms(self) -> None:
        """Looks at the norms that have been kept, as configured."""
        norms, self._norms = self._norms, []
        if norms:
            self._check(norms, self.ddp_config.check_for_nan_in_grad, self.ddp_config.check_for_large_grads)

    def _check(self, norms: list[Tensor], check_for_nan_or_inf: bool, check_for_large: bool) -> None:
        machine = get_rerun_state_machine()
        for device_norm, bucket in zip(norms, self.buckets, strict=True):
            # On the host, so that several questions wait for the device once.
            norm = device_norm.cpu()
            where = f"in the local norm of the {bucket.grad_data.dtype} gradients after backward"
            if check_for_nan_or_inf:
                machine.validate_result(norm, rejection_func=torch.isnan, message=f"found NaN {where}")
                machine.validate_result(norm, rejection_func=torch.isinf, message=f"found Inf {where}")
            if check_for_large:
                is_large = functools.partial(
                    machine.is_unexpectedly_large, threshold=_LARGE_GRAD_FACTOR, context="grads"
                )
                machine.validate_result(
                    norm,
                    rejection_func=is_large,
                    message=f"found unexpectedly large value {where}",
                    fatal=False,
                )

    def _reduce(self, bucket: _ParamAndGradBucket) -> dist.Work | None:
        """Sum or mean over the ranks: of the whole bucket, or of this rank's shard, in place."""
        op = dist.ReduceOp.AVG if self.ddp_config.average_in_collective else dist.ReduceOp.SUM
        if not self.ddp_config.use_distributed_optimizer:
            return collectives.all_reduce(bucket.grad_data, self.collective_group, op, async_op=True)
        shard = shard_buffer(bucket.grad_data, self.collective_group_size)[self._rank]
        return collectives.reduce_scatter(shard, bucket.grad_data, self.collective_group, op, async_op=True)

    # --- parameters -----------------------------------------------------------------------------------------

    @property
    def awaits_params(self) -> bool:
        """True from a change of the shards until all of them have been gathered."""
        return self._params_changed

    def settle_params(self) -> None:
        """Waits for a gather under way, so that shards may be changed."""
        if self._gathers is not None:
            self._wait_for_params()

    def mark_params_changed(self) -> None:
        """Notes that the optimizer changed this rank's shards."""
        self._params_changed = True

    def start_param_sync(self, force_sync: bool = False) -> None:
        """Starts to gather the shards of all ranks, unless that is under way.

        With ``force_sync``, and without ``overlap_param_gather``, they are gathered when this returns.
        """
        if self._gathers is None:
            self._params_changed = True
            self._gathers = [
                self._gather(bucket) for bucket in self.buckets if self.collective_group_size > 1
            ]
        if force_sync or not self.ddp_config.overlap_param_gather:
            self._wait_for_params()

    def finish_param_sync(self, skip_next_bucket_dispatch: bool = False) -> None:
        """Makes sure that the parameters are those after the last step, and starts with the next group's."""
        if self._params_changed:
            self.start_param_sync()
            self._wait_for_params()
        following = self.next_param_gather_bucket_group
        if not skip_next_bucket_dispatch and following is not None and following.awaits_params:
            following.start_param_sync()

    def _wait_for_params(self) -> None:
        _wait(self._gathers)
        self._gathers = None
        self._params_changed = False

    def _gather(self, bucket: _ParamAndGradBucket) -> dist.Work | None:
        assert bucket.param_data is not None, "gathered where parameters are sharded"
        shard = shard_buffer(bucket.param_data, self.collective_group_size)[self._rank]
        return collectives.all_gather(bucket.param_data, shard, self.collective_group, async_op=True)


def missing_gradients(names: list[str]) -> UsageError:
    """What to raise where backward has not reached some parameters."""
    shown = ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
    return UsageError(
        f"no gradient has arrived for {len(names)} trainable parameters ({shown}), which are reduced behind "
        "backward: let the loss of a step's last micro-batch depend on them, freeze them "
        "(requires_grad=False), or leave overlap_grad_reduce out"
    )


def _wait(works: Iterable[dist.Work | None] | None) -> None:
    for work in works or ():
        if work is not None:
            work.wait()


def partition_buckets(
    buffers: list[_ParamAndGradBuffer], force_single_bucket_group: bool = False
) -> list[_ParamAndGradBucketGroup]:
    """A group per bucket, or one of all buckets, as a chain in the order in which backward completes them.

    Args:
        buffers: of one model chunk, over the same ranks.
    """
    if not buffers:
        return []
    first = buffers[0]
    # A bucket is complete when backward reaches the earliest of its parameters.
    completes_at: list[tuple[int, _ParamAndGradBucket]] = []
    for buffer in buffers:
        indices = dict(zip(buffer.params, buffer.param_indices, strict=True))
        completes_at += [(min(indices[p] for p in bucket.params), bucket) for bucket in buffer.buckets]
    ordered = [bucket for _, bucket in sorted(completes_at, key=lambda pair: -pair[0])]
    members = [ordered] if force_single_bucket_group else [[bucket] for bucket in ordered]
    groups = [
        _ParamAndGradBucketGroup(
            buckets, first.ddp_config, first.data_parallel_group, first.data_parallel_world_size
        )
        for buckets in members
    ]
    for earlier, later in pairwise(groups):
        earlier.next_group, later.previous_group = later, earlier
        later.next_param_gather_bucket_group = earlier
    return groups


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


class BufferType(enum.Enum):
    """Which of a buffer's two tensors is meant."""

    PARAM = 1
    GRAD = 2
