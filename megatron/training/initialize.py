"""Initialization: from the command line to a process that is ready to build a model."""

import logging
import os
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from copy import copy
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from megatron import unbuilt
from megatron.core import accelerator, overrides, parallel_state
from megatron.core.errors import ConfigError
from megatron.core.process_groups import communicator_options, device_backend
from megatron.core.rerun_state_machine import initialize_rerun_state_machine
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.training.arguments import parse_args, print_args, validate_args
from megatron.training.buffer_sizes import communicator_buffers
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.entry import watch_ranks
from megatron.training.global_vars import get_args, get_tensorboard_writer, set_global_variables
from megatron.training.log_handler import CustomHandler
from megatron.training.processes import launcher
from megatron.training.ranks.rendezvous import comparable
from megatron.training.utils import print_datetime, print_rank_0

__getattr__ = unbuilt.names_of(__name__)

logger = logging.getLogger(__name__)


def initialize_megatron(
    extra_args_provider: Callable | None = None,
    args_defaults: Mapping[str, Any] = {},
    ignore_unknown_args: bool = False,
    allow_no_cuda: bool = False,
    skip_mpu_initialization: bool = False,
    get_embedding_ranks: Callable | None = None,
    get_position_embedding_ranks: Callable | None = None,
    parsed_args: Namespace | None = None,
    on_validated: Callable[[Namespace, Namespace], None] | None = None,
) -> Callable[[], None] | None:
    """Parse and check the arguments, register the globals, join the process groups, seed everything.

    Args:
        extra_args_provider: adds flags to the parser and returns it.
        args_defaults: values for arguments that are None after parsing.
        ignore_unknown_args: drop unknown flags instead of failing.
        allow_no_cuda: kept for callers; a run without an accelerator is always allowed.
        skip_mpu_initialization: stop before process groups exist (tools).
        get_embedding_ranks, get_position_embedding_ranks: see ``initialize_model_parallel``.
        parsed_args: arguments parsed elsewhere.
        on_validated: called with a copy of the arguments as they were given, and the validated ones.

    Returns:
        None, or with ``--lazy-mpu-init`` a function that finishes the set-up.
    """
    started = time.perf_counter()
    args = parsed_args or parse_args(extra_args_provider, ignore_unknown_args)
    given = getattr(args, "given_flags", None)
    if args.use_checkpoint_args:
        if args.world_size > 1:  # rank 0 reads for all: other hosts may lack its file
            _join_world(args)
        load_args_from_checkpoint(args)
    asked = copy(args)
    validate_args(args, args_defaults or {})
    if on_validated is not None:
        on_validated(asked, args)
    if args.rank == 0:
        print_args(args, given)
    _activate_overrides(args)
    set_global_variables(args)
    setup_logging()
    initialize_rerun_state_machine(result_rejected_tracker_filename=args.result_rejected_tracker_filename)

    def finish() -> None:
        _initialize_distributed(args, get_embedding_ranks, get_position_embedding_ranks)
        print_rank_0(f"> setting random seeds to {args.seed} ...")
        _set_random_seed(args.seed, args.data_parallel_random_init)

    if skip_mpu_initialization:
        return None
    if args.lazy_mpu_init:
        parallel_state.set_tensor_model_parallel_world_size(args.tensor_model_parallel_size)
        parallel_state.set_tensor_model_parallel_rank(args.rank)
        return finish
    finish()
    print_rank_0(f"time to initialize megatron (seconds): {time.perf_counter() - started:.3f}")
    print_datetime("after megatron is initialized")
    return None


def _activate_overrides(args: Namespace) -> None:
    """Load the replacements of the device in use before anything is built from them."""
    overrides.load(accelerator.device_type())
    names = getattr(args, "disable_override", None)
    if names:
        overrides.disable(names)


def _initialize_distributed(
    args: Namespace,
    get_embedding_ranks: Callable | None,
    get_position_embedding_ranks: Callable | None,
) -> None:
    if args.rank == 0:  # print_rank_0 knows the rank only after this
        print("> initializing torch distributed ...", flush=True)
    _join_world(args)
    _describe_device()
    if parallel_state.model_parallel_is_initialized():
        print_rank_0("model parallel is already initialized")
        return
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        hierarchical_context_parallel_sizes=args.hierarchical_context_parallel_sizes,
        expert_model_parallel_size=args.expert_model_parallel_size,
        num_distributed_optimizer_instances=args.num_distributed_optimizer_instances,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        nccl_communicator_config_path=args.nccl_communicator_config_path,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        order="tp-cp-ep-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        get_embedding_ranks=get_embedding_ranks,
        get_position_embedding_ranks=get_position_embedding_ranks,
        create_gloo_process_groups=args.enable_gloo_process_groups,
        communicator_buffers_mb=communicator_buffers(args),
    )
    for label, size in (
        ("tensor", parallel_state.get_tensor_model_parallel_world_size()),
        ("pipeline", parallel_state.get_pipeline_model_parallel_world_size()),
    ):
        print_rank_0(f"> initialized {label} model parallel with size {size}")


def _describe_device() -> None:
    """Print the device of this run, and the functions it replaces."""
    device = f"{accelerator.current_device()} ({accelerator.device_name()})"
    print_rank_0(f"> device {device}, collectives by {device_backend()}")
    replaced = [point for point in overrides.table() if point.replacement is not None]
    for label, active in (("replaced for this device", True), ("replaceable, but switched off", False)):
        names = [point.path.rpartition(".")[2] for point in replaced if point.active == active]
        if names:
            print_rank_0(f"> {label}: {', '.join(names)}")


def _join_world(args: Namespace) -> None:
    """Join the other ranks, unless this process has before."""
    _queue_communication_before_compute(args)
    accelerator.set_device(args.local_rank)
    if args.bf16 and not accelerator.supports_bf16():
        raise ConfigError(f"--bf16: {accelerator.device_name()} does not compute in bf16; use --fp16")
    if torch.distributed.is_initialized():
        return
    _connect_hosts_on_demand()
    torch.distributed.init_process_group(
        backend=accelerator.world_backend(args.distributed_backend, args.enable_gloo_process_groups),
        pg_options=_world_options(args),
        store=_rendezvous(args),
        world_size=args.world_size,
        rank=args.rank,
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
    )


def _rendezvous(args: Namespace) -> torch.distributed.Store:
    """Wait for the other ranks; the store for process groups."""
    if args.world_size == 1:  # needs no port and no host name
        return torch.distributed.HashStore()
    launcher.check_network()
    watcher = watch_ranks(args.rank, args.world_size)
    if watcher is None:
        found = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}
        raise ConfigError(
            f"WORLD_SIZE={args.world_size}, but MASTER_ADDR={found['MASTER_ADDR']} and "
            f"MASTER_PORT={found['MASTER_PORT']} do not say where rank 0 is: export both on all ranks (the "
            "host's name or address, and a free port below 65536), or start with torchrun"
        )
    watcher.time_limit_s = 60.0 * args.distributed_timeout_minutes
    watcher.stalls_count = accelerator.is_accelerated()
    return watcher.rendezvous(args.rendezvous_timeout, comparable(args))


def _world_options(args: Namespace) -> Any:
    if accelerator.collective_backend(args.distributed_backend) != accelerator.collective_backend():
        return None
    return communicator_options(("world",), communicator_buffers(args))


def _connect_hosts_on_demand() -> None:
    """Let gloo open only the connections that it needs, where a device's backend runs most collectives.

    By default a group opens one to each of its ranks as it is made: in a world of a thousand ranks more than
    the thousand files that a process may usually have open.
    """
    if accelerator.is_accelerated():
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")


def _queue_communication_before_compute(args: Namespace) -> None:
    """Use one hardware queue under NCCL, which keeps a collective ahead of the kernels it overlaps with.

    The driver reads the variable when its context is made, which is later than this.
    """
    variable = "CUDA_DEVICE_MAX_CONNECTIONS"
    splits = args.tensor_model_parallel_size > 1 or args.context_parallel_size > 1
    if accelerator.collective_backend(args.distributed_backend) != "nccl" or not splits:
        return
    if os.environ.setdefault(variable, "1") != "1" and args.rank == 0:
        print(
            f"WARNING: {variable}={os.environ[variable]}: tensor and context parallel communication overlaps "
            f"better with {variable}=1",
            flush=True,
        )


def _set_random_seed(
    seed_: int,
    data_parallel_random_init: bool = False,
    te_rng_tracker: bool = False,
    inference_rng_tracker: bool = False,
    use_cudagraphable_rng: bool = False,
) -> None:
    """Seed Python, NumPy, torch and the named device streams.

    Pipeline stages get different seeds, and so do data-parallel ranks with
    ``data_parallel_random_init``; tensor-parallel ranks differ in their own stream only.
    """
    if seed_ is None or seed_ <= 0:
        raise ConfigError(f"--seed {seed_}: give a positive integer, for example --seed 1234")
    # Initial weights do not depend on the stage of a layer, dropout does.
    weight_seed = seed_
    if data_parallel_random_init:
        weight_seed += 10 * parallel_state.get_data_parallel_rank()
    seed = weight_seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(
        seed,
        te_rng_tracker,
        inference_rng_tracker,
        use_cudagraphable_rng=use_cudagraphable_rng,
        weight_seed=weight_seed,
    )


def write_args_to_tensorboard() -> None:
    """Every argument as a text entry at the starting iteration."""
    writer = get_tensorboard_writer()
    if writer is None:
        return
    args = get_args()
    for name, value in vars(args).items():
        writer.add_text(name, str(value), global_step=args.iteration)


def setup_logging() -> None:
    """Log to stdout as ``LEVEL:name:message``.

    The level comes from ``--logging-level``, else from ``MEGATRON_LOGGING_LEVEL``, else INFO.
    """
    args = get_args()
    level = args.logging_level
    if level is None:
        from_environment = os.environ.get("MEGATRON_LOGGING_LEVEL", str(logging.INFO))
        if not from_environment.isdigit():
            raise ConfigError(
                f"MEGATRON_LOGGING_LEVEL={from_environment}: give a number such as 20 (INFO) or 30 (WARNING)"
            )
        level = int(from_environment)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, CustomHandler)]:
        root.removeHandler(handler)
    handler = CustomHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    root.addHandler(handler)
    root.setLevel(level)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def set_jit_fusion_options() -> None:
    """Kept for callers: eager kernels need no fuser switches and no warm-up."""
