"""Saving during a run, and stopping it before its last iteration."""

import os
import time
from argparse import Namespace
from typing import Any

import torch

from megatron.core.rerun_state_machine import DataIterators
from megatron.training.agreement import any_rank
from megatron.training.checkpointing import get_checkpoint_tracker_filename, save_checkpoint
from megatron.training.global_vars import get_args, get_signal_handler, get_timers
from megatron.training.logging.progress import append_checkpoint_line
from megatron.training.processes import stop_signals
from megatron.training.schedule_hooks import gathered_parameters
from megatron.training.utils import print_datetime

# In a checkpointing context: the iteration whose checkpoint is the newest.
_LAST_SAVED = "last saved iteration"


def context_after_loading(args: Namespace) -> dict[str, Any]:
    """A checkpointing context at the start of a run; a checkpoint just loaded from ``--save`` is in it."""
    loaded_from_there = args.load and args.save and os.path.realpath(args.load) == os.path.realpath(args.save)
    return {_LAST_SAVED: args.iteration} if loaded_from_there and args.iteration > 0 else {}


def save_checkpoint_and_time(
    iteration: int,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    num_floating_point_operations_so_far: float,
    checkpointing_context: dict | None,
    non_persistent_ckpt: bool = False,
    train_data_iterator: DataIterators = None,
) -> None:
    """Save, outside the interval that counts as training time, and print how long it took.

    An iteration that ``checkpointing_context`` knows to be in ``--save`` already is not saved again: several
    reasons to save may coincide at one iteration (interval, growing batch, exit, end of the run).
    """
    args, timers = get_args(), get_timers()
    if checkpointing_context is None:
        checkpointing_context = {}
    if not non_persistent_ckpt and checkpointing_context.get(_LAST_SAVED) == iteration:
        return
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
    if not non_persistent_ckpt:
        checkpointing_context[_LAST_SAVED] = iteration
    timers("save-checkpoint").stop(barrier=True)
    timers.log(["save-checkpoint"])
    if args.log_progress:
        append_checkpoint_line(args, iteration, num_floating_point_operations_so_far)
    timers("interval-time", log_level=0).start(barrier=True)


def answer_signals(in_training: bool) -> None:
    """Let the line about a stop say how far the run is, from now on.

    With ``--exit-signal-handler`` signals are recorded, for :func:`signal_of_any_rank`.

    Args:
        in_training: False where all iterations are done.
    """
    signals = stop_signals.installed()
    if signals is None:
        return
    signals.describe = _progress_in_training if in_training else _progress_after_training
    if get_args().exit_signal_handler:
        signals.recorder = get_signal_handler()


def signal_of_any_rank() -> int:
    """Number of a signal after which all ranks shall save and stop, or 0. All ranks call this together."""
    return get_signal_handler().signal_of_any_rank() if get_args().exit_signal_handler else 0


def print_exit_after(number: int) -> None:
    """The last line of a run that a signal has ended."""
    received = "" if number == stop_signals.LAUNCHER_GONE else "receiving "
    note = "." if get_args().save else ": nothing was saved, because --save is not given."
    print_datetime(f"exiting program after {received}{stop_signals.describe_signal(number)}{note}")


def _progress_in_training() -> str:
    args = get_args()
    iteration = getattr(args, "curr_iteration", args.iteration) + 1
    if args.save and _saved_iteration(args.save) == iteration:
        return f"after iteration {iteration}, whose checkpoint in {args.save} is complete"
    advice = "add --save and --exit-signal-handler" if not args.save else "add --exit-signal-handler"
    return f"in iteration {iteration}, which is not saved ({advice}); {_newest_checkpoint_text(args.save)}"


def _progress_after_training() -> str:
    return f"after training; {_newest_checkpoint_text(get_args().save)}"


def _newest_checkpoint_text(save: str | None) -> str:
    if not save:
        return "there is no checkpoint"
    iteration = _saved_iteration(save)
    if iteration is None:
        return f"there is no checkpoint in {save}"
    return f"the checkpoint of iteration {iteration} in {save} is complete"


def _saved_iteration(save: str) -> int | None:
    """Iteration in the tracker file, read without the other ranks."""
    path = get_checkpoint_tracker_filename(save)
    if not os.path.isfile(path):
        return None
    with open(path) as file:
        text = file.read().strip()
    return int(text) if text.isdigit() else None


def checkpoint_and_decide_exit(
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    iteration: int,
    num_floating_point_operations_so_far: float,
    checkpointing_context: dict,
    train_data_iterator: DataIterators,
) -> bool:
    """Save if it is time to, and decide whether the run must stop now.

    Checked in this order: a signal to any rank, the save interval, a signal during that save, the time limit,
    the exit interval. A run that stops has saved first, if ``--save`` is given.
    """
    args = get_args()

    def save() -> None:
        if args.save:
            save_checkpoint_and_time(
                iteration,
                model,
                optimizer,
                opt_param_scheduler,
                num_floating_point_operations_so_far,
                checkpointing_context,
                train_data_iterator=train_data_iterator,
            )

    if number := signal_of_any_rank():
        save()
        print_exit_after(number)
        return True
    if args.save_interval and iteration % args.save_interval == 0:
        save()
        if number := signal_of_any_rank():
            print_exit_after(number)
            return True
    if args.exit_duration_in_mins:
        minutes = (time.time() - args.process_start_time) / 60.0
        if any_rank(minutes > args.exit_duration_in_mins):
            save()
            print_datetime(f"exiting program after {minutes:.1f} minutes")
            return True
    if args.exit_interval and iteration % args.exit_interval == 0:
        save()
        print_datetime(f"exiting program at iteration {iteration}")
        return True
    return False
