"""State that data-parallel ranks hold in slices of buckets: the slices, and collecting them on one rank.

The layout on that rank is the layout of the buffers without the padding at the ends of buckets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import accelerator
from megatron.core.errors import CheckpointError, ConfigError, NotBuiltYetError

if TYPE_CHECKING:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucket, _ParamAndGradBuffer

_PARAM = "param"
# Optimizer -> what it keeps per element.
_STATE_KEYS = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
_COALESCED = "buckets_coalesced"
# Elements of all ranks together that travel at a time: a bucket may be as large as the model, and without
# groups for host memory it passes through the devices (of all ranks, where a backend gathers on all).
_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class Range:
    """Elements ``start`` to ``end``, the end excluded."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.end - self.start

    def normalize(self, start: int = 0) -> "Range":
        """A range of the same size that begins at ``start``."""
        return Range(start, start + self.size)

    def __len__(self) -> int:
        return self.size


class BucketShard:
    """A data-parallel rank's slice of a bucket.

    Args:
        buffer: the bucket's buffer.
        bucket: cut into ``ranks`` equal slices, padding included; this is number ``rank``.

    Attributes:
        model_data, grad_data: [numel / ranks] views of the bucket's parameters and gradients.
        main_data: the parameters in fp32: ``model_data`` itself if that is fp32, else a copy.
        ranges: where the parts of parameters lie that fall into the slice.

    Raises:
        ConfigError: the bucket is of a buffer of gradients alone.
    """

    def __init__(self, buffer: "_ParamAndGradBuffer", bucket: "_ParamAndGradBucket", rank: int, ranks: int):
        if bucket.param_data is None:
            raise ConfigError(
                "the distributed optimizer needs parameters in buffers: build these with "
                "DistributedDataParallelConfig(use_distributed_optimizer=True)"
            )
        self.bucket = bucket
        size = bucket.grad_data.numel() // ranks
        first = bucket.offset + rank * size
        self.model_data = bucket.param_data[rank * size : (rank + 1) * size]
        self.grad_data = bucket.grad_data[rank * size : (rank + 1) * size]
        self.main_data = self.model_data.float()  # no copy of fp32
        self.ranges: dict[torch.nn.Parameter, Range] = {}
        for param in bucket.params_list:
            start, end, _ = buffer.param_index_map[param]
            start, end = max(start - first, 0), min(end - first, size)
            if start < end:
                self.ranges[param] = Range(start, end)

    @property
    def is_copy(self) -> bool:
        """True where parameters are in half precision and ``main_data`` is a copy."""
        return self.main_data is not self.model_data

    def part(self, flat: Tensor, param: torch.nn.Parameter) -> Tensor:
        """The elements of ``param`` in a tensor of the slice's layout: a view."""
        where = self.ranges[param]
        return flat[where.start : where.end]


class _Exchange:
    """Slices of all ranks to the first one and back, in host memory where a group for that exists."""

    def __init__(self, device_group: dist.ProcessGroup | None, host_group: dist.ProcessGroup | None):
        self._group = device_group if host_group is None else host_group
        on_host = self._group is None or host_group is not None
        self._device = torch.device("cpu") if on_host else accelerator.current_device()
        self.ranks = 1 if self._group is None else self._group.size()
        self.is_first = self._group is None or self._group.rank() == 0
        self._first = None if self._group is None else dist.get_global_rank(self._group, 0)

    def gather(self, own: Tensor) -> Tensor | None:
        """[size] of every rank -> [ranks * size] on the first; None on the others. Both in host memory."""
        if self.ranks == 1:
            return own
        whole = torch.empty(self.ranks, own.numel()) if self.is_first else None
        for part in self._parts(own.numel()):
            piece = own[part].to(self._device)
            pieces = None
            if self.is_first:
                pieces = list(torch.empty(self.ranks, piece.numel(), device=self._device))
            dist.gather(piece, pieces, dst=self._first, group=self._group)
            for row, arrived in zip(() if whole is None else whole, pieces or (), strict=True):
                row[part] = arrived
        return None if whole is None else whole.view(-1)

    def scatter(self, whole: Tensor | None, size: int) -> Tensor:
        """[ranks * size] of the first rank, None on the others -> [size] of every rank. In host memory."""
        if whole is not None and self.ranks == 1:
            return whole
        own = torch.empty(size)
        for part in self._parts(size):
            piece = torch.empty(part.stop - part.start, device=self._device)
            rows = None if whole is None else whole.view(-1, size)
            pieces = None if rows is None else [row[part].to(self._device) for row in rows]
            dist.scatter(piece, pieces, src=self._first, group=self._group)
            own[part] = piece
        return own

    def _parts(self, size: int) -> Iterator[slice]:
        """Cuts a rank's [size] into what travels at a time; the same on all ranks."""
        length = max(1, _AT_ONCE // self.ranks)
        return (slice(start, min(start + length, size)) for start in range(0, size, length))

    def raise_everywhere(self, error: Exception | None) -> None:
        """Raises the first rank's error on all ranks."""
        if self.ranks > 1:
            shared = [error]
            dist.broadcast_object_list(shared, src=self._first, group=self._group, device=self._device)
            error = shared[0]
        if error is not None:
            raise error


class ShardedState:
    """Main parameters and moments of a distributed optimizer.

    Args:
        buffers: that are updated.
        shards: of each buffer, this rank's slice of every bucket.
        main_params: of each model parameter with a part in the slices, that part in fp32.
        optimizer: the torch optimizer, whose state has an entry for each parameter of the slices.
        kind: its name in the configuration, ``adam`` or ``sgd``.
        device_group: ranks that share the buffers; None for this one alone.
        host_group: the same ranks for collecting over host memory; None to collect on the device.
    """

    def __init__(
        self,
        buffers: list["_ParamAndGradBuffer"],
        shards: list[list[BucketShard]],
        main_params: dict[torch.nn.Parameter, Tensor],
        optimizer: torch.optim.Optimizer,
        kind: str,
        device_group: dist.ProcessGroup | None,
        host_group: dist.ProcessGroup | None,
    ):
        self._buffers, self._shards = buffers, shards
        self._main_params, self._optimizer = main_params, optimizer
        self._keys = (_PARAM, *_STATE_KEYS[kind])
        self._exchange = _Exchange(device_group, host_group)

    def gather(self) -> dict[Any, Any] | None:
        """See ``DistributedOptimizer.get_parameter_state_dp_zero``."""
        exchange = self._exchange
        state: dict[Any, Any] = {_COALESCED: True}
        for number, (buffer, shards) in enumerate(zip(self._buffers, self._shards, strict=True)):
            whole: dict[str, Any] = {"numel_unpadded": buffer.numel_unpadded}
            for key in self._keys:
                pieces = []
                for shard in shards:
                    flat = exchange.gather(self._flatten(shard, key))
                    if flat is not None:
                        pieces.append(flat[: shard.bucket.numel_unpadded])
                if exchange.is_first:
                    whole[key] = torch.cat(pieces)
            state[number] = {_types(buffer): whole}
        return state if exchange.is_first else None

    def scatter(self, state: dict[Any, Any] | None, update_legacy: bool) -> None:
        """See ``DistributedOptimizer.load_parameter_state_from_dp_zero``."""
        if update_legacy:
            raise NotBuiltYetError(
                "converting distributed optimizer state of before Megatron core 0.8",
                "ckpt_convert_update_legacy_dist_opt_format",
                "Leave this state unread (no_load_optim).",
            )
        exchange = self._exchange
        if not exchange.is_first:
            state = None  # the first rank's counts
        exchange.raise_everywhere(self._find_error(state) if exchange.is_first else None)
        for number, (buffer, shards) in enumerate(zip(self._buffers, self._shards, strict=True)):
            for key in self._keys:
                whole = None if state is None else state[number][_types(buffer)][key]
                offset = 0
                for shard in shards:
                    used, padded = shard.bucket.numel_unpadded, shard.bucket.grad_data.numel()
                    flat = None
                    if whole is not None:
                        flat = whole[offset : offset + used].float()
                        flat = torch.nn.functional.pad(flat, (0, padded - used))
                    self._unflatten(shard, key, exchange.scatter(flat, shard.main_data.numel()))
                    offset += used

    def _entries(self, shard: BucketShard, key: str) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
        """Each parameter with a part in the slice, and that part of the wanted tensor."""
        for param in shard.ranges:
            main = self._main_params[param]
            yield param, main if key == _PARAM else self._optimizer.state[main][key]

    @torch.no_grad()
    def _flatten(self, shard: BucketShard, key: str) -> Tensor:
        """[size of the slice] fp32 in host memory, zeros between the parameters."""
        flat = torch.zeros(shard.main_data.numel())
        for param, values in self._entries(shard, key):
            shard.part(flat, param).copy_(values)
        return flat

    @torch.no_grad()
    def _unflatten(self, shard: BucketShard, key: str, flat: Tensor) -> None:
        for param, values in self._entries(shard, key):
            values.copy_(shard.part(flat, param))

    def _find_error(self, state: dict[Any, Any] | None) -> CheckpointError | None:
        """What keeps a saved state from fitting."""
        problem = self._find_mismatch(state) if isinstance(state, dict) else "there is none"
        if problem is None:
            return None
        return CheckpointError(
            f"the distributed optimizer's state does not fit this run: {problem}. Resume with the model, "
            "precision and bucket settings of the saved run (overlap_grad_reduce, ddp_bucket_size), or leave "
            "it unread (no_load_optim)"
        )

    def _find_mismatch(self, state: dict[Any, Any]) -> str | None:
        if not state.get(_COALESCED):
            return "it has the layout of before Megatron core 0.8, a piece per bucket and rank"
        numbers = [key for key in state if isinstance(key, int)]
        if len(numbers) != len(self._buffers):
            return f"it has {len(numbers)} buffers, this run {len(self._buffers)}"
        for number, buffer in enumerate(self._buffers):
            saved = state.get(number, {})
            if _types(buffer) not in saved:
                return f"buffer {number} holds {sorted(map(str, saved))}, here it is {_types(buffer)}"
            entry = saved[_types(buffer)]
            missing = [key for key in self._keys if key not in entry]
            if missing:
                return f"buffer {number} has no {', '.join(missing)}"
            sizes = {entry[key].numel() for key in self._keys} | {entry["numel_unpadded"]}
            if sizes != {buffer.numel_unpadded}:
                return f"buffer {number} has {sorted(sizes)} elements, here {buffer.numel_unpadded}"
            if any(entry[key][_gaps(buffer)].any() for key in self._keys):
                return f"buffer {number} was cut into other buckets, so that its parameters lie elsewhere"
        return None


def _types(buffer: "_ParamAndGradBuffer") -> tuple[torch.dtype, torch.dtype]:
    return buffer.param_dtype, buffer.grad_dtype


def _gaps(buffer: "_ParamAndGradBuffer") -> Tensor:
    """Positions of the state without a parameter: [numel_unpadded] bool. What is stored there is zero."""
    gaps = torch.ones(buffer.numel, dtype=torch.bool)
    for start, end, _ in buffer.param_index_map.values():
        gaps[start:end] = False
    return torch.cat([gaps[b.offset : b.offset + b.numel_unpadded] for b in buffer.buckets])
