"""What happens around each step without being part of it: profiling, garbage, hashes, slow ranks."""

import gc
import os
from argparse import Namespace
from typing import Any

import torch

from megatron.core import accelerator
from megatron.core.errors import TrainingError
from megatron.core.utils import StragglerDetector, check_param_hashes_across_dp_replicas
from megatron.training.agreement import any_rank
from megatron.training.global_vars import get_args
from megatron.training.schedule_hooks import gathered_parameters
from megatron.training.utils import print_rank_0


class StepHooks:
    """Context of the training loop; its methods are called around every step.

    Args:
        args: run arguments.
        model: model chunks.
        first_iteration: iterations finished before this run.
    """

    def __init__(self, args: Namespace, model: list[torch.nn.Module], first_iteration: int):
        self._args = args
        self._model = model
        self._first_iteration = first_iteration
        self._profiler: Any = None
        self._reported_flops = self._flops()

    def __enter__(self) -> "StepHooks":
        if self._args.log_straggler:
            StragglerDetector().configure(
                self._args.world_size,
                self._args.rank,
                mmcnt=self._args.straggler_minmax_count,
                port=self._args.straggler_ctrlr_port,
                enabled=not self._args.disable_straggler_on_startup,
            )
        if self._args.manual_gc:
            gc.disable()
            gc.collect()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop_profiler()
        if self._args.log_straggler:
            StragglerDetector().close()
        if self._args.manual_gc:
            gc.enable()

    def before_step(self, iteration: int) -> None:
        """Start the profiler when its window opens."""
        args = self._args
        if args.profile and args.rank in args.profile_ranks and iteration == args.profile_step_start:
            self._profiler = _make_profiler(args)
            self._profiler.start()

    def after_step(self, iteration: int) -> None:
        """Run what is due after ``iteration`` finished iterations."""
        args = self._args
        if args.train_sync_interval and iteration % args.train_sync_interval == 0:
            accelerator.synchronize()
        if args.log_straggler and iteration % args.log_interval == 0:
            flops = self._flops()
            StragglerDetector().report(flops - self._reported_flops, args.log_interval)
            self._reported_flops = flops
        interval = args.check_weight_hash_across_dp_replicas_interval
        if interval and iteration % interval == 0:
            with gathered_parameters(self._model):
                equal = check_param_hashes_across_dp_replicas(self._model, cross_check=True)
            if any_rank(not equal):
                raise TrainingError(
                    f"iteration {iteration}: the weights of data-parallel replicas differ; a device or the "
                    "network returned wrong results. Resume from the last checkpoint."
                )
            print_rank_0(f">>> Weight hashes match after {iteration} iterations...")
        if self._profiler is not None:
            self._profiler.step()
            if iteration >= args.profile_step_end:
                self._stop_profiler()
        if args.manual_gc and args.manual_gc_interval and iteration % args.manual_gc_interval == 0:
            gc.collect()

    def _flops(self) -> float:
        """Floating-point operations of all steps so far."""
        return getattr(self._args, "num_floating_point_operations_so_far", 0)

    def _stop_profiler(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def _make_profiler(args: Namespace) -> Any:
    """A profiler with ``start``, ``step`` and ``stop`` that writes one trace per rank into a directory.

    Torch's own is readable by TensorBoard and by chrome://tracing. ``--use-pytorch-profiler`` asks for it
    where the device has another; it then records the host alone, because what it can see of such a device
    is up to the device's package and may end the process.
    """
    directory = args.tensorboard_dir or os.path.join(args.save or ".", "profile")
    own = accelerator.companion("make_profiler")
    name = "torch's" if own is None or args.use_pytorch_profiler else f"the {accelerator.device_type()}'s"
    print_rank_0(
        f"profiling iterations {args.profile_step_start} to {args.profile_step_end} into {directory}, "
        f"by {name} profiler"
    )
    if own is not None and not args.use_pytorch_profiler:
        return own(directory, max(1, args.profile_step_end - args.profile_step_start))
    return torch.profiler.profile(
        activities=None if own is None else [torch.profiler.ProfilerActivity.CPU],
        record_shapes=True,
        on_trace_ready=torch.profiler.tensorboard_trace_handler(directory),
    )


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def post_training_step_callbacks(
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    iteration: int,
    prof: Any,
    num_floating_point_operations_since_last_log_event: float,
) -> None:
    """What is due after ``iteration`` finished iterations, for loops of one's own.

    Args:
        model: model chunks.
        prof: profiler that is running, or None.
        num_floating_point_operations_since_last_log_event: for the report on slow ranks.
        optimizer, opt_param_scheduler: not looked at.
    """
    hooks = StepHooks(get_args(), model, 0)
    hooks._profiler = prof
    hooks._reported_flops -= num_floating_point_operations_since_last_log_event
    hooks.after_step(iteration)
