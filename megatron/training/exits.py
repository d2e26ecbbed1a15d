"""When a run saves, and when it stops before its last iteration."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from megatron.training.agreement import any_rank
from megatron.training.checkpointing import save_checkpoint
from megatron.training.global_vars import get_args, get_signal_handler, get_timers
from megatron.training.logging.progress import append_checkpoint_line
from megatron.training.schedule_hooks import gathered_parameters
from megatron.training.utils import print_datetime


def save_checkpoint_and_time(
    iteration: int,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    num_floating_point_operations_so_far: float,
    checkpointing_context: dict,
    non_persistent_ckpt: bool = False,
    train_data_iterator: Iterator | None = None,
) -> None:
    """Save, outside the interval that counts as training time, and report how long it took."""
    args, timers = get_args(), get_timers()
    timers("interval-time").stop()
    timers("save-checkpoint", log_level=0).start(barrier=True)
    with gathered_parameters(model):
        save_checkpoint(
            iteration,
            model,
            optimizer,
            opt_param_scheduler,
            num_floating_point_operations_so_far,
            checkpointing_context,
            non_persistent_ckpt=non_persistent_ckpt,
            train_data_iterator=train_data_iterator,
        )
    timers("save-checkpoint").stop(barrier=True)
    timers.log(["save-checkpoint"])
    if args.log_progress:
        append_checkpoint_line(args, iteration, num_floating_point_operations_so_far)
    timers("interval-time", log_level=0).start(barrier=True)


def checkpoint_and_decide_exit(
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    iteration: int,
    num_floating_point_operations_so_far: float,
    checkpointing_context: dict,
    train_data_iterator: Iterator | None,
) -> bool:
    """Save if it is time to, and say whether the run must stop now.

    Checked in this order: SIGTERM on any rank, the save interval, the time limit, the exit interval. A
    run that stops has saved first, if ``--save`` is given.
    """
    args = get_args()
    saved = False

    def save() -> None:
        nonlocal saved
        if args.save and not saved:
            save_checkpoint_and_time(
                iteration,
                model,
                optimizer,
                opt_param_scheduler,
                num_floating_point_operations_so_far,
                checkpointing_context,
                train_data_iterator=train_data_iterator,
            )
            saved = True

    if args.exit_signal_handler and any(get_signal_handler().signals_received()):
        save()
        print_datetime("exiting program after receiving SIGTERM.")
        return True
    if args.save_interval and iteration % args.save_interval == 0:
        save()
    if args.exit_duration_in_mins:
        minutes = (time.time() - args.process_start_time) / 60.0
        if any_rank(minutes > args.exit_duration_in_mins):
            save()
            print_datetime(f"exiting program after {minutes} minutes")
            return True
    if args.exit_interval and iteration % args.exit_interval == 0:
        save()
        print_datetime(f"exiting program at iteration {iteration}")
        return True
    return False
