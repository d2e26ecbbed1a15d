"""Running the model on held-out data, and printing what came out."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron.core import accelerator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.core.utils import StragglerDetector
from megatron.training.agreement import any_rank
from megatron.training.exits import signal_of_any_rank
from megatron.training.global_vars import get_args, get_tensorboard_writer, get_timers
from megatron.training.logging.step_log import write_scalar
from megatron.training.schedule_hooks import average_reports, gathered_parameters, with_fields
from megatron.training.utils import is_last_rank, print_rank_0, print_rank_last

LARGEST_EXPONENT = 20.0


def perplexity(loss: float) -> float:
    """exp(loss), capped where the number would only be noise."""
    return math.exp(min(LARGEST_EXPONENT, loss))


def evaluate(
    forward_step_func: Callable,
    data_iterator: Iterator | list,
    model: list[torch.nn.Module],
    process_non_loss_data_func: Callable | None,
    config: Any,
    verbose: bool = False,
    non_loss_data_func: Callable | None = None,
) -> tuple[dict[str, float] | None, Any, bool]:
    """Mean losses over ``eval_iters`` global batches.

    Returns:
        (loss per name, or None when it was cut short; collected non-loss data; whether the time limit or a
        signal has cut it short).
    """
    timers = get_timers()
    timers("evaluate", log_level=0).start(barrier=True)
    rerun_machine = get_rerun_state_machine()
    rerun_mode = rerun_machine.get_mode()
    rerun_machine.set_mode(RerunMode.DISABLED)
    was_training = [chunk.training for chunk in model]
    for chunk in model:
        chunk.eval()
    # Forward passes of an evaluation would count as those of training.
    config = with_fields(config, timers=None)
    try:
        with gathered_parameters(model), StragglerDetector().paused():
            losses, cut_short = _run_eval_iters(forward_step_func, data_iterator, model, config, verbose)
            collected = None
            if not cut_short:
                collected = _collect_non_loss_data(
                    forward_step_func,
                    data_iterator,
                    model,
                    config,
                    process_non_loss_data_func,
                    non_loss_data_func,
                )
    finally:
        for chunk, training in zip(model, was_training, strict=True):
            chunk.train(training)
        rerun_machine.set_mode(rerun_mode)
    timers("evaluate").stop()
    if get_args().timing_log_level > 0:
        timers.log(["evaluate"], reset=False)
    return losses, collected, cut_short


def _run_eval_iters(
    forward_step_func: Callable,
    data_iterator: Iterator | list,
    model: list[torch.nn.Module],
    config: Any,
    verbose: bool,
) -> tuple[dict[str, float] | None, bool]:
    args = get_args()
    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    batch_size = num_microbatches * args.micro_batch_size * args.data_parallel_size
    if verbose:
        print_rank_0(f"Evaluating on {args.eval_iters * batch_size} samples")
    forward_backward = get_forward_backward_func()
    reports: list[dict[str, Any]] = []
    # Whatever cuts it short: a run that goes on from here reads what an uninterrupted one would.
    consumed_at_the_end = args.consumed_valid_samples + args.eval_iters * batch_size
    with torch.no_grad():
        for _ in range(args.eval_iters):
            if signal_of_any_rank():
                args.consumed_valid_samples = consumed_at_the_end
                return None, True
            reports += forward_backward(
                forward_step_func=forward_step_func,
                data_iterator=data_iterator,
                model=model,
                num_microbatches=num_microbatches,
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                decoder_seq_length=args.decoder_seq_length,
                forward_only=True,
                config=config,
            )
            if args.empty_unused_memory_level >= 1:
                accelerator.empty_cache()
            args.consumed_valid_samples += batch_size
            if _time_is_up(args):
                print_rank_0("Exiting during evaluation, timelimit reached")
                args.consumed_valid_samples = consumed_at_the_end
                return None, True
    return {name: float(value) for name, value in average_reports(reports).items()}, False


def _time_is_up(args: Any) -> bool:
    if not args.exit_duration_in_mins:
        return False
    return any_rank((time.time() - args.process_start_time) / 60.0 > args.exit_duration_in_mins)


def _collect_non_loss_data(
    forward_step_func: Callable,
    data_iterator: Iterator | list,
    model: list[torch.nn.Module],
    config: Any,
    process_non_loss_data_func: Callable | None,
    non_loss_data_func: Callable | None,
) -> Any:
    if non_loss_data_func is not None:
        return non_loss_data_func(model)
    if process_non_loss_data_func is None:
        return None
    # On all ranks, although the last alone looks at it: the stages before it have to run too.
    args = get_args()
    with torch.no_grad():
        return get_forward_backward_func()(
            forward_step_func=forward_step_func,
            data_iterator=data_iterator,
            model=model,
            num_microbatches=1,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            forward_only=True,
            collect_non_loss_data=True,
            config=config,
        )


def evaluate_and_print_results(
    prefix: str,
    forward_step_func: Callable,
    data_iterator: Iterator | list,
    model: list[torch.nn.Module],
    iteration: int,
    process_non_loss_data_func: Callable | None,
    config: Any,
    verbose: bool = False,
    write_to_tensorboard: bool = True,
    non_loss_data_func: Callable | None = None,
    split: str | None = None,
) -> bool:
    """Evaluate, print the losses in one line, write their points.

    Args:
        prefix: what the line says after "loss at", such as ``iteration 10 on test set``.
        iteration: x of the points.
        verbose: say before how many samples are evaluated.
        write_to_tensorboard: write the points, to every writer.
        split: ``validation`` or ``test``: the first word of the line, and the last of the points' tags; None
            takes ``test`` from a prefix that ends in "test set", as callers of the original give it.

    Returns:
        True when the time limit or a signal has cut it short, in which case no loss is printed.
    """
    args = get_args()
    if args.manual_gc and args.manual_gc_eval:
        gc.collect()
    losses, collected, cut_short = evaluate(
        forward_step_func,
        data_iterator,
        model,
        process_non_loss_data_func,
        config,
        verbose,
        non_loss_data_func,
    )
    if args.manual_gc and args.manual_gc_eval:
        gc.collect(generation=0)
    # Taken on all ranks, so that every evaluation is timed alone.
    seconds = get_timers()("evaluate").elapsed()
    if cut_short:
        return True
    assert losses is not None, "None where it was cut short"
    split = split or ("test" if prefix.endswith("test set") else "validation")
    if write_to_tensorboard:
        _write_points(args, split, losses, iteration)
    if process_non_loss_data_func is not None and is_last_rank():
        process_non_loss_data_func(collected, iteration, get_tensorboard_writer())
    fields = [f"{split} loss at {prefix}"]
    for name, value in losses.items():
        fields += [f"{name} value: {value:.6E}", f"{name} PPL: {perplexity(value):.6E}"]
    fields.append(f"elapsed time (ms): {seconds * 1000.0:.1f}")
    print_rank_last("".join(f" {field} |" for field in fields))
    return False


def _write_points(args: Any, split: str, losses: dict[str, float], iteration: int) -> None:
    for name, value in losses.items():
        write_scalar(f"{name} {split}", value, iteration, args.consumed_train_samples)
        if args.log_validation_ppl_to_tensorboard:
            ppl = perplexity(value)
            write_scalar(f"{name} {split} ppl", ppl, iteration, args.consumed_train_samples)
