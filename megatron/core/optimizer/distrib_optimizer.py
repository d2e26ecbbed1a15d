"""ZeRO-1 (Rajbhandari et al., arXiv:1910.02054): optimizer state and update sharded over data-parallel ranks.

Every rank owns an equal slice of every bucket of the DDP buffers. The wrapper, ``megatron.core.distributed``,
has reduced the gradients into that slice, the update is made on an fp32 copy of the slice's parameters, and
all ranks gather the result.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.optimizer.base import _create_nothing
from megatron.core.optimizer.grad_scaler import MegatronGradScaler
from megatron.core.optimizer.mixed_precision import MixedPrecisionOptimizer, copy_attributes
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.sharded_state import BucketShard, Range, ShardedState
from megatron.core.optimizer.torch_optimizers import merge_group
from megatron.core.timers import timed
from megatron.core.utils.tensors import mark

if TYPE_CHECKING:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup, _ParamAndGradBuffer

__all__ = ["DistributedOptimizer", "Range"]

# Neither library is used here, whether it is installed or not.
HAVE_APEX_OR_TE = False


@runtime_checkable
class WrappedChunk(Protocol):
    """What the optimizer asks of a model chunk in its DDP wrapper."""

    ddp_config: DistributedDataParallelConfig
    bucket_groups: "list[_ParamAndGradBucketGroup]"
    expert_parallel_bucket_groups: "list[_ParamAndGradBucketGroup]"


def check_wrapping(model_chunks: Sequence[torch.nn.Module]) -> list[WrappedChunk]:
    """The chunks, all of them wrapped so that their buffers can be sharded.

    Raises:
        ConfigError: one is not wrapped, or for whole optimizer state.
    """
    wrapped = []
    for number, chunk in enumerate(model_chunks):
        if not isinstance(chunk, WrappedChunk) or not chunk.ddp_config.use_distributed_optimizer:
            raise ConfigError(
                f"use_distributed_optimizer: model chunk {number} is not wrapped for it; wrap it by "
                "DistributedDataParallel with DistributedDataParallelConfig(use_distributed_optimizer=True)"
            )
        wrapped.append(chunk)
    return wrapped


class DistributedOptimizer(MixedPrecisionOptimizer):
    """Updates this rank's slice of every bucket.

    The torch ``optimizer`` comes with the model's parameters in its groups and gets in their place what of
    them falls into this rank's slices, flat and in fp32. A model parameter points at its part by the
    attribute ``main_param`` (None if nothing of it is here) and has ``main_param_sharded = True``.

    Args:
        grad_scaler: keeper of the loss scale; None for no scaling and no overflow check.
        init_state_fn: creates the state of ``optimizer`` before its first step.
        model_chunks: DDP-wrapped chunks whose parameters these are.
        per_model_buffers: the buffers to update, by number of the chunk.
        data_parallel_group: ranks that share them; None for this one alone.
        data_parallel_group_gloo: the same ranks, for collecting state over host memory; None to collect it
            on the device.
        data_parallel_group_idx: number of the group among all of its kind.
        distributed_optimizer_instance_id: number of this copy of the state; always 0.

    Raises:
        ConfigError: a chunk that is not wrapped for sharded state.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        grad_scaler: MegatronGradScaler | None,
        init_state_fn: Callable[[torch.optim.Optimizer], None] | None,
        model_chunks: Sequence[torch.nn.Module],
        per_model_buffers: dict[int, list["_ParamAndGradBuffer"]],
        data_parallel_group: dist.ProcessGroup | None,
        data_parallel_group_gloo: dist.ProcessGroup | None,
        data_parallel_group_idx: int,
        distributed_optimizer_instance_id: int,
    ):
        super().__init__(optimizer, config, grad_scaler, init_state_fn or _create_nothing)
        self.model_chunks = check_wrapping(model_chunks)
        self.ddp_config = self.model_chunks[0].ddp_config
        self.per_model_buffers = per_model_buffers
        self.buffers = [buffer for buffers in per_model_buffers.values() for buffer in buffers]
        self.data_parallel_group = data_parallel_group
        self.data_parallel_group_gloo = data_parallel_group_gloo
        self.data_parallel_group_idx = data_parallel_group_idx
        self.distributed_optimizer_instance_id = distributed_optimizer_instance_id
        rank, ranks = (
            (0, 1)
            if data_parallel_group is None
            else (data_parallel_group.rank(), data_parallel_group.size())
        )
        self.shards = [
            [BucketShard(buffer, bucket, rank, ranks) for bucket in buffer.buckets] for buffer in self.buffers
        ]
        self._shard_of = {param: shard for shard in self._all_shards() for param in shard.ranges}
        self._main_params: dict[torch.nn.Parameter, Tensor] = {}
        self._model_params: list[torch.nn.Parameter] = []
        for group in optimizer.param_groups:
            group["params"] = self._make_main_params(group["params"])
        self._bucket_groups = self._find_bucket_groups()

    def _all_shards(self) -> Iterator[BucketShard]:
        return (shard for shards in self.shards for shard in shards)

    def _make_main_params(self, params: list[torch.nn.Parameter]) -> list[Tensor]:
        """The parts of ``params`` in this rank's slices, in fp32, with the attributes statistics look at."""
        parts = []
        for param in params:
            self._model_params.append(param)
            shard = self._shard_of.get(param)
            main = None
            if shard is not None:
                main = shard.part(shard.main_data, param)
                copy_attributes(main, param)
                self._main_params[param] = main
                parts.append(main)
            mark(param, main_param=main, main_param_sharded=True)
        return parts

    def _find_bucket_groups(self) -> list["_ParamAndGradBucketGroup"]:
        """Groups of this optimizer's buckets in the order of forward, the chunks' chains joined."""
        own = {id(bucket) for buffer in self.buffers for bucket in buffer.buckets}
        found: list[_ParamAndGradBucketGroup] = []
        for chunk in self.model_chunks:
            for chain in (chunk.bucket_groups, chunk.expert_parallel_bucket_groups):
                groups = [group for group in reversed(chain) if id(group.buckets[0]) in own]
                if found and groups:
                    found[-1].next_param_gather_bucket_group = groups[0]
                found += groups
        return found

    # --- the step -------------------------------------------------------------------------------------------

    def get_grad_stats_parallel_group(self) -> dist.ProcessGroup | None:
        """All ranks: each holds another slice of another part of the model."""
        return dist.group.WORLD if dist.is_initialized() else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.start_overflow_watch()
        for main in self._main_params.values():
            main.grad = None
        for param in self._model_params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.detach_().zero_()

    def step_with_ready_grads(self) -> bool:
        for group in self._bucket_groups:
            group.settle_params()
        success = super().step_with_ready_grads()
        with timed(self.config, "params-all-gather"):
            self._distribute_params()
        return success

    def _distribute_params(self) -> None:
        """Gathers the parameters, or leaves that to forward and starts with those it needs first."""
        for group in self._bucket_groups:
            group.mark_params_changed()
        if not self.ddp_config.overlap_param_gather:
            for group in self._bucket_groups:
                group.start_param_sync()
        elif not self.ddp_config.align_param_gather and self._bucket_groups:
            self._bucket_groups[0].start_param_sync()

    def _copy_model_grads_to_main_grads(self) -> None:
        for shard in self._all_shards():
            # A gradient that is fp32 already is not copied: unscaling and clipping then change the buffer.
            grads = shard.grad_data.float()
            for param in shard.ranges:
                self._main_params[param].grad = shard.part(grads, param)

    @torch.no_grad()
    def _copy_main_params_to_model_params(self) -> None:
        for shard in self._all_shards():
            if shard.is_copy:
                shard.model_data.copy_(shard.main_data)

    @torch.no_grad()
    def _copy_model_params_to_main_params(self) -> None:
        for shard in self._all_shards():
            if shard.is_copy:
                shard.main_data.copy_(shard.model_data)

    # --- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Hyper-parameters and the loss scale, equal on all ranks. The sharded tensors are in
        :meth:`get_parameter_state_dp_zero`.
        """
        steps = [float(entry["step"]) for entry in self.optimizer.state.values() if "step" in entry]
        counted = {"step": max(steps, default=0.0)} if self.config.optimizer == "adam" else {}
        groups = [
            {**{key: value for key, value in group.items() if key != "params"}, **counted}
            for group in self.param_groups
        ]
        state: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler is not None:
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved_groups = _find_groups(state_dict, len(self.param_groups))
        self.init_state_fn(self.optimizer)
        for group, saved in zip(self.param_groups, saved_groups, strict=True):
            group.update(merge_group(group, saved))
            for main in group["params"]:
                entry = self.optimizer.state[main]
                if "step" in entry:
                    entry["step"] = torch.tensor(float(saved["step"]), dtype=torch.float32)
        self._load_scale(state_dict.get("grad_scaler"))

    @property
    def collects_state(self) -> bool:
        """True on the first rank of the group."""
        return self.data_parallel_group is None or self.data_parallel_group.rank() == 0

    def _sharded_state(self) -> ShardedState:
        return ShardedState(
            self.buffers,
            self.shards,
            self._main_params,
            self.optimizer,
            self.config.optimizer,
            self.data_parallel_group,
            self.data_parallel_group_gloo,
        )

    def get_parameter_state_dp_zero(self) -> dict[Any, Any] | None:
        """Main parameters and moments of all ranks on the first one, as ``distrib_optim.pt`` holds them.

        All ranks of the group must call it.

        Returns:
            ``"buckets_coalesced"``: True, and for each number of a buffer a dictionary from (parameter type,
            gradient type) to ``"param"``, ``"exp_avg"``, ``"exp_avg_sq"``, each [numel_unpadded] fp32 on the
            host, and ``"numel_unpadded"``. None on other ranks.
        """
        self.init_state_fn(self.optimizer)
        return self._sharded_state().gather()

    def load_parameter_state_from_dp_zero(
        self, state_dict: dict[Any, Any] | None, *, update_legacy_format: bool = False
    ) -> None:
        """Takes what :meth:`get_parameter_state_dp_zero` gave; the first rank's is distributed.

        Raises:
            CheckpointError: on all ranks, if it was saved with other buffers or another layout of them.
                Nothing is changed then.
            NotBuiltYetError: ``update_legacy_format``.
        """
        self.init_state_fn(self.optimizer)
        self._sharded_state().scatter(state_dict, update_legacy_format)

    def sharded_state_dict(
        self,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        sharding_type: str = "fully_sharded_model_space",
    ) -> dict[str, Any]:
        """Not built yet, like that of every optimizer."""
        return super().sharded_state_dict(model_sharded_state_dict, is_loading)

    def save_parameter_state(self, filename: str) -> None:
        """Writes ``distrib_optim.pt`` from the first rank; all ranks of the group must call it."""
        state = self.get_parameter_state_dp_zero()
        if state is not None:
            torch.save(state, filename)

    def load_parameter_state(self, filename: str, *, update_legacy_format: bool = False) -> None:
        """Reads what :meth:`save_parameter_state` wrote, on the first rank, and distributes it.

        Raises:
            CheckpointError: see :meth:`load_parameter_state_from_dp_zero`.
        """
        state = torch.load(filename, map_location="cpu", weights_only=True) if self.collects_state else None
        self.load_parameter_state_from_dp_zero(state, update_legacy_format=update_legacy_format)


def _find_groups(state_dict: dict[str, Any], wanted: int) -> list[dict[str, Any]]:
    """The ``wanted`` groups of parameters of a saved state.

    Raises:
        CheckpointError: it has others, or was saved by another kind of optimizer.
    """
    inner = state_dict.get("optimizer")
    if not isinstance(inner, dict) or "param_groups" not in inner or inner.get("state"):
        problem = (
            f"optimizer state with the entries {sorted(map(str, state_dict))} was not saved with the "
            "distributed optimizer (use_distributed_optimizer), as this run has it"
        )
    elif len(inner["param_groups"]) != wanted:
        problem = f"the checkpoint has {len(inner['param_groups'])} groups of parameters, this run {wanted}"
    else:
        return inner["param_groups"]
    raise CheckpointError(
        f"{problem}: resume with the optimizer settings of the saved run, or leave this state unread "
        "(no_load_optim)"
    )
