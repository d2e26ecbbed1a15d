"""Building the model, its optimizer and its schedules from the arguments."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch

from megatron.core import accelerator, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.errors import ConfigError
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from megatron.training.arguments.model_config import field_values
from megatron.training.checkpointing import load_checkpoint
from megatron.training.global_vars import get_args, get_timers
from megatron.training.model_family import model_family
from megatron.training.upcycling import check_upcycling, upcycle
from megatron.training.utils import print_rank_0


def get_model(
    model_provider_func: Callable,
    model_type: ModelType = ModelType.encoder_or_decoder,
    wrap_with_ddp: bool = True,
) -> list[torch.nn.Module]:
    """Build the model of this rank: construct, count, move, cast, wrap.

    Args:
        model_provider_func: ``(pre_process, post_process) -> module``.
        model_type: kind of model, kept as ``model.model_type``.
        wrap_with_ddp: False for inference and tools.

    Returns:
        One module per model chunk of this rank.
    """
    args = get_args()
    chunks: list[Any] = _build_chunks(model_provider_func, model_type)
    _print_parameter_count(chunks)
    for index, chunk in enumerate(chunks):
        chunk.to(accelerator.current_device())
        config = get_model_config(chunk)
        if config.fp16 or config.bf16:
            chunks[index] = Float16Module(config, chunk)
    if wrap_with_ddp:
        # Backward ends in the first chunk: the others' gradients are reduced behind the work that is left.
        ddp_config = ddp_config_from_args(args, sum(p.nelement() for c in chunks for p in c.parameters()))
        chunks = [
            DistributedDataParallel(get_model_config(chunk), ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]
        if args.data_parallel_random_init:
            for chunk in chunks:
                chunk.broadcast_params()
    return chunks


def layer_spec_from_args(args: Namespace, config: TransformerConfig) -> Any:
    """The spec that ``--spec`` names; without it, the family's for ``--transformer-impl``."""
    if args.spec is not None and args.spec != ["local"]:
        return spec_by_name(args.spec)
    return model_family(args).layer_spec(config, has_transformer_engine_names(args))


def has_transformer_engine_names(args: Namespace) -> bool:
    """Whether the layers that this project makes have the parameter names of ``transformer_engine``."""
    return args.transformer_impl == "transformer_engine" and args.spec is None


def spec_by_name(words: Sequence[str]) -> Any:
    """The spec that ``--spec MODULE NAME`` names, or that the function of that name returns.

    Raises:
        ConfigError: there is none, or it is something else.
    """
    asked = f"--spec {' '.join(words)}"
    try:
        found = import_module(tuple(words))
        spec = found() if isinstance(found, FunctionType) else found
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{asked}: {error}; give the path of a module and the name of a spec in it, for example "
            "--spec megatron.core.models.gpt.gpt_layer_specs get_gpt_layer_local_spec"
        ) from error
    is_module = isinstance(spec, type) and issubclass(spec, torch.nn.Module)
    if not is_module and not isinstance(spec, (ModuleSpec, TransformerBlockSubmodules)):
        raise ConfigError(f"{asked}: is of type {type(spec).__name__}, not a spec of a layer or a block")
    return spec


def _build_chunks(model_provider_func: Callable, model_type: ModelType) -> list[torch.nn.Module]:
    """The bare model of each virtual stage of this rank, one without them; with attributes."""
    stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    chunks = []
    for virtual_rank in range(stages or 1):
        if stages is not None:
            parallel_state.set_virtual_pipeline_model_parallel_rank(virtual_rank)
        chunk = model_provider_func(
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        chunk.model_type = model_type
        for param in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
        _check_parameter_count(chunk)
        chunks.append(chunk)
    if stages is not None:
        parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    return chunks


def _print_parameter_count(chunks: list[torch.nn.Module]) -> None:
    """One line per model-parallel rank."""
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return
    coordinates = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    count = sum(param.nelement() for chunk in chunks for param in chunk.parameters())
    print(
        " > number of parameters on (tensor, pipeline) model parallel rank "
        f"({coordinates[0]}, {coordinates[1]}): {count}",
        flush=True,
    )


def _check_parameter_count(model: torch.nn.Module) -> None:
    """Compare the parameters of a chunk, while it is the one being built, with the closed form of its share.

    A model built wrongly (a bias too many, a head too few, a layer twice) trains and saves happily; counting
    is cheap.
    """
    expected = model_family(get_args()).parameters(model)
    if expected is None:
        return
    counted = sum(param.nelement() for param in model.parameters())
    if counted != expected:
        raise ConfigError(
            f"this rank's part of the model has {counted} parameters but its configuration implies "
            f"{expected}: a layer spec (--spec) or a module builds something else than the configuration says"
        )


def ddp_config_from_args(args: Namespace, num_parameters: int = 0) -> DistributedDataParallelConfig:
    """How gradients and parameters travel between data-parallel ranks.

    Args:
        args: validated arguments.
        num_parameters: of all chunks of this rank, which ``--ddp-num-buckets`` divides.
    """
    renamed = {
        "grad_reduce_in_fp32": lambda a: a.accumulate_allreduce_grads_in_fp32,
        "check_for_nan_in_grad": lambda a: a.check_for_nan_in_loss_and_grad,
        "bucket_size": lambda a: _bucket_size(a, num_parameters),
        "average_in_collective": lambda a: a.ddp_average_in_collective,
        "pad_buckets_for_high_nccl_busbw": lambda a: a.ddp_pad_buckets_for_high_nccl_busbw,
    }
    return DistributedDataParallelConfig(**field_values(DistributedDataParallelConfig, args, renamed))


def _bucket_size(args: Namespace, num_parameters: int) -> int | None:
    """Elements that fill a gradient bucket; None leaves the choice to the wrapper."""
    if args.ddp_num_buckets is None:
        return args.ddp_bucket_size
    return max(1, -(-num_parameters // args.ddp_num_buckets))


def optimizer_config_from_args(args: Namespace) -> OptimizerConfig:
    """Every field of ``OptimizerConfig`` that has an argument of its name."""
    return OptimizerConfig(**field_values(OptimizerConfig, args, {}))


def update_train_iters(args: Namespace) -> None:
    """Derive ``args.train_iters`` from ``--train-samples``; a partial last batch is dropped.

    With a batch-size ramp the ramp is walked step by step, because every step consumes another number
    of samples.
    """
    from megatron.core.num_microbatches_calculator import (
        get_current_global_batch_size,
        update_num_microbatches,
    )

    if args.train_iters:
        return
    if args.rampup_batch_size is None:
        args.train_iters = args.train_samples // args.global_batch_size
    else:
        ramp_samples = int(args.rampup_batch_size[2])
        iterations = consumed = 0
        while consumed <= ramp_samples and consumed <= args.train_samples:
            update_num_microbatches(consumed, consistency_check=False)
            consumed += get_current_global_batch_size()
            iterations += 1
        update_num_microbatches(0, consistency_check=False)
        remaining = args.train_samples - consumed
        args.train_iters = iterations + max(remaining, 0) // args.global_batch_size
    print_rank_0(f"setting training iterations to {args.train_iters}")


def get_optimizer_param_scheduler(optimizer: Any) -> OptimizerParamScheduler:
    """Learning-rate and weight-decay schedule, counted in samples.

    Iteration flags become samples by the global batch size; ``--train-samples`` runs give samples
    directly.
    """
    args = get_args()
    if args.train_iters and args.train_samples is None:
        update_train_iters(args)
        batch = args.global_batch_size
        decay = (args.lr_decay_iters or args.train_iters) * batch
        args.lr_decay_iters = args.lr_decay_iters or args.train_iters
        warmup = args.lr_warmup_iters * batch
        wsd_decay = None if args.lr_wsd_decay_iters is None else args.lr_wsd_decay_iters * batch
        wd_span = args.train_iters * batch
    elif args.train_samples:
        update_train_iters(args)
        args.lr_decay_samples = args.lr_decay_samples or args.train_samples
        decay = args.lr_decay_samples
        warmup = args.lr_warmup_samples
        wsd_decay = args.lr_wsd_decay_samples
        wd_span = args.train_samples
    else:
        raise ConfigError("say how long to train: --train-iters N or --train-samples N")
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=decay,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=wd_span,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=wsd_decay,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


def setup_model_and_optimizer(
    model_provider_func: Callable,
    model_type: ModelType,
    no_wd_decay_cond: Callable | None = None,
    scale_lr_cond: Callable | None = None,
    lr_mult: float = 1.0,
    checkpointing_context: dict | None = None,
) -> tuple[list[torch.nn.Module], Any, OptimizerParamScheduler]:
    """Model chunks, optimizer and scheduler, restored from ``--load`` if it holds a checkpoint.

    Sets ``args.iteration`` and ``args.num_floating_point_operations_so_far``.
    """
    args, timers = get_args(), get_timers()
    if args.moe_use_upcycling:
        check_upcycling(args)
    model = get_model(model_provider_func, model_type)
    optimizer_config = optimizer_config_from_args(args)
    optimizer_config.timers = get_model_config(model[0]).timers = timers
    optimizer = get_megatron_optimizer(
        optimizer_config,
        model,
        no_wd_decay_cond,
        scale_lr_cond,
        lr_mult,
        use_gloo_process_groups=args.enable_gloo_process_groups,
    )
    scheduler = get_optimizer_param_scheduler(optimizer)
    args.iteration = 0
    args.num_floating_point_operations_so_far = 0
    if args.moe_use_upcycling:
        upcycle(
            args, model, optimizer, lambda: get_model(model_provider_func, model_type, wrap_with_ddp=False)
        )
    elif args.load is not None or args.pretrained_checkpoint is not None:
        timers("load-checkpoint", log_level=0).start(barrier=True)
        args.iteration, args.num_floating_point_operations_so_far = load_checkpoint(
            model, optimizer, scheduler, checkpointing_context=checkpointing_context
        )
        timers("load-checkpoint").stop(barrier=True)
        timers.log(["load-checkpoint"])
    return model, optimizer, scheduler
