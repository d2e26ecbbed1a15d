"""The wrapper that collects a model's gradients, and reduces them over data-parallel ranks."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import accelerator
from megatron.core.collectives import group_size
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.distributed.buffer_building import (
    ReductionGroups,
    build_buffers,
    choose_bucket_size,
    gradient_scaling_factors,
)
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import (
    _ParamAndGradBucketGroup,
    _ParamAndGradBuffer,
    missing_gradients,
    partition_buckets,
)
from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils.tensors import mark

# Field of the configuration -> feature that has no code yet.
_NOT_BUILT = {
    "fp8_param_gather": "gathering parameters in fp8",
    "use_custom_fsdp": "fully sharded data parallelism",
}
# Mixed-type addition makes a temporary of the whole operand on a CPU; beyond some 32 MiB that memory comes
# fresh from the kernel every time, at 6 times the cost of the addition itself.
_ADDITION_PIECE = 1 << 20  # elements; other devices convert as they add, and pay for every launch


class DistributedDataParallel(_BaseDataParallel):
    """Adds gradients of all micro-batches of a step up in contiguous buffers and reduces them over ranks.

    After backward a parameter's gradient is in ``param.main_grad`` and ``param.grad`` is None. A layer that
    adds its weight gradient into ``main_grad`` itself says so by ``param.grad_added_to_main_grad = True``;
    what autograd delivers for that parameter is ignored then, unless the layer also set
    ``param.zero_out_wgrad``. A layer that does so after backward calls ``param.gradient_ready()``, where that
    is not None.

    After :meth:`finish_grad_sync` gradients are means over all data x context ranks (sums with
    ``config.calculate_per_token_loss``): everywhere in the buffers, or, with the distributed optimizer, in
    this rank's shard of each bucket, and meaningless elsewhere.

    With ``overlap_grad_reduce`` a bucket is reduced as soon as the last of its gradients arrives in the
    micro-batch that runs outside :meth:`no_sync`; every trainable parameter must get one there. With
    ``overlap_param_gather`` the parameters that the optimizer changed are gathered while forward runs: each
    module waits for its own, and starts the gathering of the next ones.

    Args:
        config: of the model.
        ddp_config: settings of this wrapper.
        module: the model, on its device, with its final types.
        disable_bucketing: reduce all gradients at once.

    Attributes:
        buffers, bucket_groups: of dense parameters; one buffer per (parameter type, gradient type).
        expert_parallel_buffers, expert_parallel_bucket_groups: of parameters with ``allreduce = False``.

    Raises:
        NotBuiltYetError: a setting whose code does not exist yet.
        ConfigError: settings that contradict each other.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: torch.nn.Module,
        disable_bucketing: bool = False,
    ):
        super().__init__(config=config, module=module)
        _check(ddp_config)
        if has_config_logger_enabled(config):
            log_config_to_disk(config, {"ddp_config": ddp_config}, prefix="DistributedDataParallel")
        self.ddp_config = ddp_config
        self.disable_bucketing = disable_bucketing
        self.overlap_param_gather_with_optimizer_step = False
        self.is_last_microbatch = True
        self._params = [param for param in module.parameters() if param.requires_grad]
        self._build_buffers()
        self._group_of = {param: group for group in self._groups() for param in group.params}
        hook = _add_and_announce if ddp_config.overlap_grad_reduce else _add_to_main_grad
        for param in self._params:
            # Told by layers that add a gradient after backward.
            ready = functools.partial(self._group_of[param].register_grad_ready, param)
            mark(param, gradient_ready=ready if ddp_config.overlap_grad_reduce else None)
            param.register_post_accumulate_grad_hook(hook)
        self._reset_flags()
        self._gather_hooks: list[torch.utils.hooks.RemovableHandle] = []
        if ddp_config.overlap_param_gather:
            self.enable_forward_pre_hook()

    def _build_buffers(self) -> None:
        groups = ReductionGroups.of_this_run()
        ranks = group_size(groups.dense)
        dense_factor, expert_factor = gradient_scaling_factors(
            self.ddp_config, self.config.calculate_per_token_loss, groups
        )
        bucket_size = choose_bucket_size(self.ddp_config, self.disable_bucketing, ranks)
        named = [
            (index, name, param)
            for index, (name, param) in enumerate(self.module.named_parameters())
            if param.requires_grad
        ]
        dense = [entry for entry in named if getattr(entry[2], "allreduce", True)]
        expert = [entry for entry in named if not getattr(entry[2], "allreduce", True)]
        self.buffers: Any = build_buffers(dense, self.ddp_config, groups.dense, bucket_size, dense_factor)
        self.expert_parallel_buffers = build_buffers(
            expert, self.ddp_config, groups.expert, bucket_size, expert_factor
        )
        self.bucket_groups = partition_buckets(self.buffers, self.disable_bucketing)
        self.expert_parallel_bucket_groups = partition_buckets(
            self.expert_parallel_buffers, self.disable_bucketing
        )

    def _groups(self) -> list[_ParamAndGradBucketGroup]:
        return self.bucket_groups + self.expert_parallel_bucket_groups

    def _all_buffers(self) -> list[_ParamAndGradBuffer]:
        return self.buffers + self.expert_parallel_buffers

    # --- gradients ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context of all micro-batches but the last."""
        self._set_last_microbatch(False)
        try:
            yield
        finally:
            self._set_last_microbatch(True)

    def _set_last_microbatch(self, is_last: bool) -> None:
        self.is_last_microbatch = is_last
        for group in self._groups():
            group.is_last_microbatch = is_last

    def start_grad_sync(self, *unused: Any) -> None:
        """Starts to reduce all gradients that are not being reduced yet.

        Raises:
            TrainingError: NaN or Inf among them, if that is to be checked and nothing is reduced behind
                backward.
        """
        for group in self._groups():
            group.start_grad_sync()

    def finish_grad_sync(self) -> None:
        """Waits until all gradients are reduced; starts what has not been started in this step.

        Raises:
            TrainingError: NaN or Inf among this rank's, if that is to be checked.
            UsageError: with ``overlap_grad_reduce``, some gradients have not arrived, and nobody called
                :meth:`start_grad_sync`; nothing has been done then.
        """
        names = {param: name for name, param in self.module.named_parameters()}
        missing = [names[param] for group in self._groups() for param in group.missing_params()]
        if missing:
            raise missing_gradients(missing)
        for group in self._groups():
            group.start_grad_sync()
        for group in self._groups():
            group.finish_grad_sync()

    def scale_gradients(self, scaling_factor: float | Tensor) -> None:
        """Multiplies all gradients by a number or a 0-dim tensor."""
        for buffer in self._all_buffers():
            buffer.scale_gradients(scaling_factor)

    def zero_grad_buffer(self) -> None:
        """Sets all gradients to zero, for a new step."""
        for group in self._groups():
            group.reset()
        for buffer in self._all_buffers():
            buffer.reset()
        self._reset_flags()

    def _reset_flags(self) -> None:
        for param in self._params:
            mark(param, grad_added_to_main_grad=False)

    # --- parameters -----------------------------------------------------------------------------------------

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Calls the wrapped module with the parameters after the last step."""
        if self.ddp_config.overlap_param_gather and not self._gather_hooks:
            self._finish_params()
        return self.module(*inputs, **kwargs)

    def enable_forward_pre_hook(self) -> None:
        """Makes every module wait for its parameters, and start the gathering of the next ones.

        Raises:
            ConfigError: without ``overlap_param_gather`` there is nothing to wait for.
        """
        if not self.ddp_config.overlap_param_gather:
            raise ConfigError("parameters are gathered in the optimizer's step: set overlap_param_gather")
        if self._gather_hooks:
            return
        for module in self.module.modules():
            params = [param for param in module.parameters(recurse=False) if param.requires_grad]
            groups = list(dict.fromkeys(self._group_of[param] for param in params))
            if groups:
                hook = functools.partial(_wait_for_params, groups)
                self._gather_hooks.append(module.register_forward_pre_hook(hook))

    def disable_forward_pre_hook(self, param_sync: bool = True) -> None:
        """Removes the hooks; with ``param_sync`` all parameters are those after the last step on return."""
        for handle in self._gather_hooks:
            handle.remove()
        self._gather_hooks.clear()
        if param_sync:
            self._finish_params()

    def _finish_params(self) -> None:
        for group in reversed(self._groups()):
            if group.awaits_params:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def start_param_sync(self, *unused: Any, force_sync: bool = False, force_dispatch: bool = False) -> None:
        """Gathers parameters from the shards of all ranks.

        With ``overlap_param_gather`` this starts the gathering of what the optimizer has changed, and forward
        waits for it; without, or with ``force_sync``, all parameters are gathered on return.

        Args:
            force_sync: gather everything, changed or not, and wait.
            force_dispatch: start with everything, changed or not.
        """
        only_changed = self.ddp_config.overlap_param_gather and not (force_sync or force_dispatch)
        for group in reversed(self._groups()):
            if group.awaits_params or not only_changed:
                group.start_param_sync(force_sync)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> Any:
        """Loads state into the wrapped module, once no gathering can overwrite it."""
        for group in self._groups():
            group.settle_params()
        return super().load_state_dict(state_dict, strict=strict)

    def broadcast_params(self) -> None:
        """Gives all data-parallel ranks the parameters of the first one."""
        for buffer in self._all_buffers():
            group = buffer.data_parallel_group
            if group is None or group_size(group) == 1:
                continue
            source = dist.get_global_rank(group, 0)
            whole = (
                [param.data for param in buffer.params] if buffer.param_data is None else [buffer.param_data]
            )
            for values in whole:
                dist.broadcast(values, src=source, group=group)


def _check(ddp_config: DistributedDataParallelConfig) -> None:
    for field, feature in _NOT_BUILT.items():
        if getattr(ddp_config, field):
            raise NotBuiltYetError(feature, field, f"Leave {field} out.")
    if ddp_config.num_distributed_optimizer_instances > 1:
        raise NotBuiltYetError(
            "several copies of the sharded optimizer state",
            "num_distributed_optimizer_instances",
            "Leave it at 1.",
        )
    if ddp_config.overlap_param_gather and not ddp_config.use_distributed_optimizer:
        raise ConfigError(
            "overlap_param_gather gathers what the distributed optimizer has sharded: add "
            "use_distributed_optimizer, or leave overlap_param_gather out"
        )


def _wait_for_params(groups: list[_ParamAndGradBucketGroup], *unused: Any) -> None:
    """Hook that runs before a module's forward."""
    for group in groups:
        if group.awaits_params:
            group.finish_param_sync()


def _add_and_announce(param: Any) -> None:
    """The same hook for gradients that are reduced behind backward."""
    if param.grad is None:
        return  # put off: whoever computes it later announces it
    _add_to_main_grad(param)
    param.gradient_ready()


@torch.no_grad()
def _add_to_main_grad(param: Any) -> None:
    """Hook that runs when autograd has finished a parameter's gradient of one micro-batch."""
    if param.grad is None:
        return  # a weight gradient that was put off: the layer adds it to main_grad itself
    # zero_out_wgrad: the layer added its part itself, and delivered zeros in its place; the rest is another
    # use's.
    if not param.grad_added_to_main_grad or getattr(param, "zero_out_wgrad", False):
        _accumulate(param.main_grad, param.grad)
    param.grad = None


def _accumulate(main_grad: Tensor, grad: Tensor) -> None:
    """``main_grad += grad``, of any two types."""
    on_cpu = main_grad.device.type == accelerator.CPU
    if main_grad.dtype == grad.dtype or main_grad.numel() <= _ADDITION_PIECE or not on_cpu:
        main_grad.add_(grad)
        return
    pieces = zip(
        main_grad.view(-1).split(_ADDITION_PIECE), grad.reshape(-1).split(_ADDITION_PIECE), strict=True
    )
    for main_piece, piece in pieces:
        main_piece.add_(piece)
