"""The objects one training process shares: arguments, tokenizer, timers, writers, signal handler.

Everything else is passed explicitly. ``set_global_variables`` fills the registry once;
``destroy_global_vars`` empties it so that a process can start another run (tests do).
"""

import os
import sys
from argparse import Namespace
from typing import Any

from megatron.core.errors import ConfigError, UsageError
from megatron.core.timers import Timers
from megatron.training.processes import stop_signals
from megatron.training.tokenizer import build_tokenizer

_REGISTRY: dict[str, Any] = {}
# Objects of the process, which outlive one run in it.
_PROCESS: dict[str, Any] = {}


def _get(name: str) -> Any:
    if name not in _REGISTRY:
        raise UsageError(f"{name} is not initialized: call initialize_megatron() first")
    return _REGISTRY[name]


def __getattr__(name: str) -> Any:
    """``_GLOBAL_ARGS`` and its like: the objects of this moment, None before they are set."""
    if not name.startswith("_GLOBAL_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _REGISTRY.get(name.removeprefix("_GLOBAL_").lower())


def _ensure_var_is_initialized(var: Any, name: str) -> None:
    """Raises AssertionError if there is nothing called ``name`` yet."""
    if var is None:
        raise AssertionError(f"{name} is not initialized: call initialize_megatron() first")


def _set_once(name: str, value: Any) -> None:
    if name in _REGISTRY:
        raise UsageError(f"{name} is already initialized: call destroy_global_vars() first")
    _REGISTRY[name] = value


def get_args() -> Namespace:
    """Validated command-line arguments."""
    return _get("args")


def get_tokenizer():
    """The tokenizer built from the arguments."""
    return _get("tokenizer")


def get_timers() -> Timers:
    """The timers of this process."""
    return _get("timers")


def get_tensorboard_writer():
    """TensorBoard writer on the last rank when ``--tensorboard-dir`` is given, else None."""
    return _REGISTRY.get("tensorboard_writer")


def get_wandb_writer():
    """The ``wandb`` module on the last rank when ``--wandb-project`` is given, else None."""
    return _REGISTRY.get("wandb_writer")


def get_one_logger():
    """Always None: the telemetry service this name belongs to is not part of this project."""


def get_adlr_autoresume():
    """Always None: the cluster-specific requeue hook this name belongs to is not part of this project."""


def get_signal_handler():
    """The recorder of signals that end the run after a save, with ``--exit-signal-handler``."""
    return _get("signal_handler")


def get_unread_flags() -> Any:
    """The record of flags that have been read (``unread_flags.UnreadFlags``); None without one."""
    return _REGISTRY.get("unread_flags")


def set_unread_flags(record: Any) -> None:
    """Register the record, in place of an earlier one."""
    _end_record_of_reads()
    _REGISTRY["unread_flags"] = record


def _end_record_of_reads() -> None:
    if "unread_flags" in _REGISTRY:
        _REGISTRY["unread_flags"].reads.end()


def get_failure_watcher() -> Any:
    """The ``FailureWatcher`` of this process, None where no other ranks are watched."""
    return _PROCESS.get("failure_watcher")


def set_failure_watcher(watcher: Any) -> None:
    """Register the watcher of this process."""
    _PROCESS["failure_watcher"] = watcher


def set_global_variables(args: Namespace, build_tokenizer: bool = True) -> None:
    """Build and register everything that depends on the arguments.

    Args:
        args: validated arguments.
        build_tokenizer: False for tools that do not need one.
    """
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    _set_once("args", args)
    init_num_microbatches_calculator(
        args.rank,
        args.rampup_batch_size,
        args.global_batch_size,
        args.micro_batch_size,
        args.data_parallel_size,
        args.decrease_batch_size_if_needed,
    )
    if build_tokenizer:
        rebuild_tokenizer(args)
    _set_timers(args)
    _set_tensorboard_writer(args)
    _set_wandb_writer(args)
    if args.exit_signal_handler:
        from megatron.training.dist_signal_handler import DistributedSignalHandler

        _set_once("signal_handler", DistributedSignalHandler())
        if stop_signals.installed() is None:  # else signals are handed over to it when training begins
            get_signal_handler().__enter__()
    if args.config_logger_dir:
        from megatron.core.config_logger import log_config_to_disk

        log_config_to_disk(args, vars(args), prefix="args")


def rebuild_tokenizer(args: Namespace):
    """Build the tokenizer again from ``args`` and register it."""
    _REGISTRY["tokenizer"] = build_tokenizer(args)
    return _REGISTRY["tokenizer"]


def unset_global_variables() -> None:
    """Empty the registry, the micro-batch calculator included."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator

    writer = _REGISTRY.get("tensorboard_writer")
    if writer is not None:
        writer.close()
    handler = _REGISTRY.get("signal_handler")
    if handler is not None:
        handler.release()
    _end_record_of_reads()
    _REGISTRY.clear()
    destroy_num_microbatches_calculator()


destroy_global_vars = unset_global_variables


def _set_timers(args: Namespace) -> None:
    _set_once("timers", Timers(args.timing_log_level, args.timing_log_option))


def _set_tensorboard_writer(args: Namespace) -> None:
    """Only the last rank writes, because it holds the loss."""
    if not args.tensorboard_dir or args.rank != args.world_size - 1:
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print(
            "WARNING: --tensorboard-dir is given but the tensorboard package is missing; no logs are "
            "written. Install it with: pip install tensorboard",
            flush=True,
        )
        return
    print("> setting tensorboard ...", flush=True)
    _set_once(
        "tensorboard_writer",
        SummaryWriter(log_dir=args.tensorboard_dir, max_queue=args.tensorboard_queue_size),
    )


def _set_wandb_writer(args: Namespace) -> None:
    if not args.wandb_project or args.rank != args.world_size - 1:
        return
    if not args.wandb_exp_name:
        raise ConfigError("--wandb-project needs a run name: add --wandb-exp-name NAME")
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as exc:
        raise ConfigError(
            "--wandb-project is given but the wandb package is missing: pip install wandb, "
            "or drop --wandb-project"
        ) from exc
    save_dir = args.wandb_save_dir or os.path.join(args.save or ".", "wandb")
    os.makedirs(save_dir, exist_ok=True)
    wandb.init(dir=save_dir, name=args.wandb_exp_name, project=args.wandb_project, config=vars(args))
    _set_once("wandb_writer", wandb)


def flush_writers() -> None:
    """Push buffered points to disk before an exit."""
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.flush()
    sys.stdout.flush()


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def _ensure_var_is_not_initialized(var: Any, name: str) -> None:
    """Raises AssertionError if there is something called ``name`` already."""
    if var is not None:
        raise AssertionError(f"{name} is already initialized: call destroy_global_vars() first")


def set_args(args: Namespace) -> None:
    """Replace the arguments alone (tests and tools)."""
    _REGISTRY["args"] = args
