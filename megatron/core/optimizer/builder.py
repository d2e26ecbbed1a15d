"""From a configuration and a model to an optimizer."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import accelerator, parallel_state
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.optimizer.adamw import Adam, create_adam_state
from megatron.core.optimizer.base import FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.chained import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.optimizer.mixed_precision import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_groups import ParamCondition, empty_group, groups_of_config
from megatron.core.optimizer.torch_optimizers import SGD
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

# Field of the configuration -> feature whose code does not exist yet.
_NOT_BUILT = {
    "use_precision_aware_optimizer": "the precision-aware optimizer",
    "overlap_param_gather_with_optimizer_step": "gathering parameters during the optimizer step",
    "optimizer_cpu_offload": "keeping optimizer state on the host",
}


def get_megatron_optimizer(
    config: OptimizerConfig,
    model_chunks: list[torch.nn.Module] | torch.nn.Module,
    no_weight_decay_cond: ParamCondition | None = None,
    scale_lr_cond: ParamCondition | None = None,
    lr_mult: float = 1.0,
    use_gloo_process_groups: bool = True,
) -> ChainedOptimizer:
    """Optimizer over all trainable parameters of ``model_chunks``.

    All ranks of the model call this together. Chunks that are wrapped for DDP hand over their main gradients,
    others ``param.grad``. Without ``config.lr`` somebody must write a rate into the groups before the first
    step, as an ``OptimizerParamScheduler`` does.

    Args:
        config: settings.
        model_chunks: the model, or a list of its pipeline chunks.
        no_weight_decay_cond: (name, parameter) -> True for no weight decay; default biases and 1-D tensors.
        scale_lr_cond: (name, parameter) -> True for a rate multiplied by ``lr_mult``; default none.
        use_gloo_process_groups: collect sharded state over host memory; on the device otherwise.

    Returns:
        A :class:`ChainedOptimizer` of one or two members. ``chained_optimizers`` holds the optimizer of
        the dense parameters and, where any rank has experts, one of the expert parameters. Both exist also
        on a pipeline stage without such parameters: norms and overflows are found together.

    Raises:
        NotBuiltYetError: a setting whose code does not exist yet.
        ConfigError: a model without trainable parameters on any rank, or chunks that were wrapped without
            what ``config`` wants of them.
    """
    for field, feature in _NOT_BUILT.items():
        if getattr(config, field):
            raise NotBuiltYetError(feature, field, f"Leave {field} out.")
    chunks = _list_chunks(model_chunks)
    if has_config_logger_enabled(config):
        log_config_to_disk(config, {"config": config}, prefix="get_megatron_optimizer")
    log_single_rank(logger, logging.INFO, "optimizer: %s", _describe(config))
    groups = groups_of_config(config, chunks, no_weight_decay_cond, scale_lr_cond, lr_mult)
    use_gloo = config.use_distributed_optimizer and use_gloo_process_groups
    return ChainedOptimizer(
        [
            _build_member(config, member_groups, chunks, _BuffersAndRanks.of(chunks, is_expert, use_gloo))
            for is_expert, member_groups in _split_groups(config, groups).items()
        ]
    )


def _list_chunks(model_chunks: list[torch.nn.Module] | torch.nn.Module) -> list[torch.nn.Module]:
    if isinstance(model_chunks, torch.nn.ModuleList):
        return list(model_chunks)
    return [model_chunks] if isinstance(model_chunks, torch.nn.Module) else model_chunks


def _split_groups(config: OptimizerConfig, groups: list[dict[str, Any]]) -> dict[bool, list[dict[str, Any]]]:
    """Param groups of each member, by whether it is the experts'.

    There is always a dense member, and one for experts where any rank has some: the members' collectives take
    all ranks. A member without parameters on this rank gets an empty group.
    """
    if not _any_rank_has(bool(groups)):
        raise ConfigError(
            "the model has no parameter that requires a gradient: unfreeze some, or do not train it"
        )
    dense = [group for group in groups if not group["is_expert_parallel"]]
    experts = [group for group in groups if group["is_expert_parallel"]]
    split = {False: dense or [empty_group(False, config.lr, config.min_lr)]}
    if _any_rank_has(bool(experts)):
        split[True] = experts or [empty_group(True, config.lr, config.min_lr)]
    return split


def _describe(config: OptimizerConfig) -> str:
    """The settings that users choose, in words."""
    clip = f"gradients clipped at norm {config.clip_grad:g}" if config.clip_grad else "no clipping"
    floor = "" if config.min_lr is None else f", floor {config.min_lr:g}"
    rate = "no learning rate yet" if config.lr is None else f"learning rate {config.lr:g}{floor}"
    return f"{config.optimizer}, {rate}, weight decay {config.weight_decay:g}, {clip}"


def _any_rank_has(flag: bool) -> bool:
    """True where ``flag`` is true on any rank; all ranks must call it."""
    if not parallel_state.model_parallel_is_initialized() or dist.get_world_size() == 1:
        return flag
    found = torch.tensor([int(flag)], dtype=torch.int32, device=accelerator.current_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


@dataclass(frozen=True)
class _BuffersAndRanks:
    """Buffers of the dense, or of the expert, parameters, and the ranks that share them."""

    buffers: dict[int, list[Any]]
    """DDP buffers by number of the chunk; empty lists for chunks that are not wrapped."""
    data_group: dist.ProcessGroup | None
    data_group_gloo: dist.ProcessGroup | None
    model_group: dist.ProcessGroup | None

    @classmethod
    def of(cls, model_chunks: list[torch.nn.Module], is_expert: bool, use_gloo: bool) -> "_BuffersAndRanks":
        name = "expert_parallel_buffers" if is_expert else "buffers"
        # Unwrapped modules have buffers() of torch's.
        buffers = {
            number: getattr(chunk, name) if hasattr(chunk, "ddp_config") else []
            for number, chunk in enumerate(model_chunks)
        }
        if not parallel_state.model_parallel_is_initialized():
            return cls(buffers, None, None, None)
        if is_expert:
            gloo = parallel_state.get_expert_data_parallel_group_gloo() if use_gloo else None
            data_group = parallel_state.get_expert_data_parallel_group()
            model_group = parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        else:
            whole = {"with_context_parallel": True}
            gloo = parallel_state.get_data_parallel_group_gloo(**whole) if use_gloo else None
            data_group = parallel_state.get_data_parallel_group(**whole)
            model_group = parallel_state.get_model_parallel_group()
        return cls(buffers, data_group, gloo, model_group)


def _build_member(
    config: OptimizerConfig,
    groups: list[dict[str, Any]],
    model_chunks: list[torch.nn.Module],
    shared: _BuffersAndRanks,
    group_number: int | None = None,
) -> MegatronOptimizer:
    """The optimizer of one set of param groups."""
    torch_optimizer, create_state = _build_torch_optimizer(config, groups)
    for group in torch_optimizer.param_groups:
        # What a scheduler would write at once; without one the multipliers must count as well.
        group["lr"] = None if group["max_lr"] is None else group["max_lr"] * group["lr_mult"]
        group["weight_decay"] = config.weight_decay * group["wd_mult"]
    if group_number is None:
        group_number = 0 if shared.model_group is None else shared.model_group.rank()
    is_half = config.fp16 or config.bf16
    scaler = _build_grad_scaler(config) if is_half else None
    if config.use_distributed_optimizer:
        return DistributedOptimizer(
            torch_optimizer,
            config,
            grad_scaler=scaler,
            init_state_fn=create_state,
            model_chunks=model_chunks,
            per_model_buffers=shared.buffers,
            data_parallel_group=shared.data_group,
            data_parallel_group_gloo=shared.data_group_gloo,
            data_parallel_group_idx=group_number,
            distributed_optimizer_instance_id=0,
        )
    member: MegatronOptimizer
    if is_half:
        member = Float16OptimizerWithFloat16Params(torch_optimizer, config, scaler, create_state)
    else:
        member = FP32Optimizer(torch_optimizer, config, create_state)
    member.grad_stats_parallel_group = shared.model_group
    return member


def _build_torch_optimizer(
    config: OptimizerConfig, groups: list[dict[str, Any]]
) -> tuple[torch.optim.Optimizer, Callable[[torch.optim.Optimizer], None]]:
    """The inner optimizer, and the function that creates its state ahead of the first step."""
    # torch wants a number at once; the groups' own rates are written by the caller.
    common = {"lr": config.lr or 0.0, "weight_decay": config.weight_decay}
    if config.optimizer == "adam":
        betas = (config.adam_beta1, config.adam_beta2)
        return Adam(groups, betas=betas, eps=config.adam_eps, **common), _create_adam_states
    return _build_sgd(groups, momentum=config.sgd_momentum, **common), _create_momenta


def _build_sgd(groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float) -> SGD:
    """SGD by torch's single-pass kernel where the device has it."""
    build = functools.partial(SGD, lr=lr, momentum=momentum, weight_decay=weight_decay)
    try:
        return build([dict(group) for group in groups], fused=True)
    except RuntimeError:
        return build(groups)


def _create_adam_states(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            create_adam_state(optimizer.state[param], param)


def _create_momenta(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer.state[param].setdefault("momentum_buffer", torch.zeros_like(param))


def _build_grad_scaler(config: OptimizerConfig) -> MegatronGradScaler | None:
    """Constant if a scale is given, dynamic for fp16, none for bf16."""
    if config.loss_scale is not None:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _get_megatron_optimizer_based_on_param_groups(
    config: OptimizerConfig,
    model_chunks: list[torch.nn.Module],
    param_groups: list[dict[str, Any]],
    per_model_buffers: dict[int, list[Any]] | None = None,
    model_parallel_group: dist.ProcessGroup | None = None,
    data_parallel_group: dist.ProcessGroup | None = None,
    data_parallel_group_gloo: dist.ProcessGroup | None = None,
    data_parallel_group_idx: int | None = None,
    distributed_optimizer_instance_id: int | None = 0,
) -> MegatronOptimizer:
    """The optimizer of one set of param groups: a member of what :func:`get_megatron_optimizer` returns.

    Args:
        config: settings.
        model_chunks: chunks that hold the parameters.
        param_groups: as of ``_get_param_groups``.
        per_model_buffers: number of the chunk -> gradient buffers, for the distributed optimizer.
        model_parallel_group: ranks over which norms and overflows are found.
        data_parallel_group, data_parallel_group_gloo: ranks that share the distributed optimizer's state.
        data_parallel_group_idx: number of that group; by default this rank's place in the model group.
        distributed_optimizer_instance_id: only 0; several instances are not built yet.
    """
    if distributed_optimizer_instance_id:
        raise NotBuiltYetError(
            "more than one instance of the distributed optimizer",
            f"distributed_optimizer_instance_id {distributed_optimizer_instance_id}",
            "Pass 0.",
        )
    shared = _BuffersAndRanks(
        per_model_buffers or {}, data_parallel_group, data_parallel_group_gloo, model_parallel_group
    )
    return _build_member(config, param_groups, model_chunks, shared, data_parallel_group_idx)
