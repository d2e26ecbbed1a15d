"""The training loop: what a run does, from its first line to its last evaluation."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron import unbuilt
from megatron.core import accelerator, parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.family import get_model_family
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    get_current_running_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import (
    DataIterators,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
)
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import get_model_config
from megatron.training.agreement import failing_together
from megatron.training.checkpointing import check_save_directory
from megatron.training.checkpointing.state import preprocess_common_state_dict
from megatron.training.data.batch import next_sample
from megatron.training.data.loaders import (
    build_data_iterators_of_chunks,
    build_train_valid_test_data_iterators,
    build_train_valid_test_data_loaders,
    build_train_valid_test_datasets,
    cyclic_iter,
    get_train_valid_test_num_samples,
)
from megatron.training.evaluation import evaluate, evaluate_and_print_results
from megatron.training.exits import (
    answer_signals,
    checkpoint_and_decide_exit,
    context_after_loading,
    print_exit_after,
    save_checkpoint_and_time,
    signal_of_any_rank,
)
from megatron.training.global_vars import (
    destroy_global_vars,
    flush_writers,
    get_args,
    get_one_logger,
    get_timers,
)
from megatron.training.initialize import initialize_megatron, write_args_to_tensorboard
from megatron.training.logging.event_files import set_points_aside
from megatron.training.logging.progress import (
    append_start_line,
    compute_throughputs_and_append_to_progress_log,
    get_start_time_from_progress_log,
)
from megatron.training.logging.step_log import LoopLog, num_floating_point_operations, training_log
from megatron.training.model_family import DEFAULT_FAMILY
from megatron.training.model_setup import (
    get_model,
    get_optimizer_param_scheduler,
    setup_model_and_optimizer,
    update_train_iters,
)
from megatron.training.processes import stop_signals
from megatron.training.schedule_hooks import (
    average_reports,
    disable_forward_pre_hook,
    enable_forward_pre_hook,
    schedule_config,
    should_disable_forward_pre_hook,
)
from megatron.training.step_hooks import StepHooks, post_training_step_callbacks
from megatron.training.unread_flags import (
    name_flags_unread_by_script,
    name_flags_unread_in_setup,
    record_reads,
)
from megatron.training.utils import (
    append_to_progress_log,
    logical_and_across_model_parallel_group,
    print_datetime,
    print_rank_0,
    reduce_max_stat_across_model_parallel_group,
    unwrap_model,
)

__getattr__ = unbuilt.names_of(__name__)

__all__ = [
    "append_to_progress_log",
    "build_train_valid_test_data_iterators",
    "build_train_valid_test_data_loaders",
    "build_train_valid_test_datasets",
    "checkpoint_and_decide_exit",
    "compute_throughputs_and_append_to_progress_log",
    "cyclic_iter",
    "destroy_global_state",
    "disable_forward_pre_hook",
    "enable_forward_pre_hook",
    "evaluate",
    "evaluate_and_print_results",
    "get_model",
    "get_one_logger",
    "get_optimizer_param_scheduler",
    "get_start_time_from_progress_log",
    "get_train_valid_test_num_samples",
    "num_floating_point_operations",
    "post_training_step_callbacks",
    "preprocess_common_state_dict",
    "pretrain",
    "print_datetime",
    "save_checkpoint_and_time",
    "setup_model_and_optimizer",
    "should_disable_forward_pre_hook",
    "train",
    "train_step",
    "training_log",
    "unwrap_model",
    "update_train_iters",
]

# Limits such as --exit-duration-in-mins count from here: importing is part of what a job waits for.
_PROCESS_START_TIME = _TRAIN_START_TIME = time.time()

# Timers of the setup.
_MODEL_SETUP = "model-and-optimizer-setup"
_DATA_SETUP = "train/valid/test-data-iterators-setup"


@stop_signals.answered
def pretrain(
    train_valid_test_dataset_provider: Callable,
    model_provider: Callable,
    model_type: ModelType,
    forward_step_func: Callable,
    process_non_loss_data_func: Callable | None = None,
    extra_args_provider: Callable | None = None,
    args_defaults: Mapping[str, Any] = {},
    get_embedding_ranks: Callable | None = None,
    get_position_embedding_ranks: Callable | None = None,
    non_loss_data_func: Callable | None = None,
    *,
    model_family: str = DEFAULT_FAMILY,
) -> None:
    """A whole run: initialise, build, load, train, save, evaluate.

    Args:
        train_valid_test_dataset_provider: ``([n_train, n_valid, n_test]) -> three datasets or None``.
        model_provider: ``(pre_process, post_process) -> module``.
        model_type: kind of model.
        forward_step_func: ``(data_iterator, model) -> (output, loss_func)``.
        process_non_loss_data_func: ``(collected, iteration, writer)`` after an evaluation.
        extra_args_provider, args_defaults, get_embedding_ranks, get_position_embedding_ranks: see
            ``initialize_megatron``.
        non_loss_data_func: ``(model) -> anything`` run at each evaluation.
        model_family: name in ``megatron.core.models.family.FAMILIES``, for batch keys and cost formulas.
    """
    family = get_model_family(model_family).name
    _initialize(extra_args_provider, args_defaults, get_embedding_ranks, get_position_embedding_ranks, family)
    args = get_args()
    with _setup_phase(_MODEL_SETUP, "after model, optimizer, and learning rate scheduler are built"):
        model, optimizer, scheduler = setup_model_and_optimizer(model_provider, model_type)
    with _setup_phase(_DATA_SETUP, "after dataloaders are built"):
        train_iterator, valid_iterator, test_iterator = build_data_iterators_of_chunks(
            train_valid_test_dataset_provider, len(model)
        )
    name_flags_unread_in_setup()
    print_rank_0("done with setup ...")
    get_timers().log([_MODEL_SETUP, _DATA_SETUP], barrier=True)

    config = get_model_config(model[0])
    iteration = args.iteration
    args.num_floating_point_operations_at_start = args.num_floating_point_operations_so_far
    args.validated_iteration = None
    saves = context_after_loading(args)
    print_rank_0("skipping training (--skip-train is on) ..." if args.skip_train else "training ...")
    answer_signals(in_training=not args.skip_train)
    if args.do_train and not args.skip_train:
        iteration, flops = train(
            forward_step_func,
            model,
            optimizer,
            scheduler,
            train_data_iterator=train_iterator,
            valid_data_iterator=valid_iterator,
            process_non_loss_data_func=process_non_loss_data_func,
            config=config,
            checkpointing_context=saves,
            non_loss_data_func=non_loss_data_func,
        )
        print_datetime("after training is done")
        if args.save and iteration != 0:
            save = _saving(model, optimizer, scheduler, saves, train_iterator)
            save(iteration, num_floating_point_operations_so_far=flops)
    answer_signals(in_training=False)
    evaluation = _evaluation(forward_step_func, model, process_non_loss_data_func, config, non_loss_data_func)
    _evaluate_at_the_end(args, evaluation, iteration, {"validation": valid_iterator, "test": test_iterator})
    name_flags_unread_by_script()
    flush_writers()


def _initialize(
    extra_args_provider: Callable | None,
    args_defaults: Mapping[str, Any],
    get_embedding_ranks: Callable | None,
    get_position_embedding_ranks: Callable | None,
    model_family: str,
) -> None:
    """Everything before the model: arguments, process groups, the directory to save in."""
    if signals := stop_signals.installed():
        signals.describe = lambda: stop_signals.BEFORE_TRAINING
    finish = initialize_megatron(
        extra_args_provider,
        {**(args_defaults or {}), "model_family": model_family},
        get_embedding_ranks=get_embedding_ranks,
        get_position_embedding_ranks=get_position_embedding_ranks,
        on_validated=partial(record_reads, args_defaults or {}),
    )
    if finish is not None:  # --lazy-mpu-init: nobody else will
        finish()
    args = get_args()
    args.process_start_time = _PROCESS_START_TIME
    if args.save is not None:
        with failing_together():
            check_save_directory(args.save)
    append_start_line(args)


@contextlib.contextmanager
def _setup_phase(timer: str, what_is_done: str) -> Iterator[None]:
    """Time a part of the setup, and print the time of day when it is done."""
    get_timers()(timer, log_level=0).start(barrier=True)
    yield
    get_timers()(timer).stop()
    print_datetime(what_is_done)


def _saving(
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    checkpointing_context: dict,
    train_data_iterator: DataIterators,
) -> Callable[..., None]:
    """:func:`save_checkpoint_and_time` of this run, but for iteration and floating-point operations."""
    return partial(
        save_checkpoint_and_time,
        model=model,
        optimizer=optimizer,
        opt_param_scheduler=opt_param_scheduler,
        checkpointing_context=checkpointing_context,
        train_data_iterator=train_data_iterator,
    )


def _evaluation(
    forward_step_func: Callable,
    model: list[torch.nn.Module],
    process_non_loss_data_func: Callable | None,
    config: Any,
    non_loss_data_func: Callable | None,
) -> Callable[..., bool]:
    """:func:`evaluate_and_print_results` of this model."""
    return partial(
        evaluate_and_print_results,
        forward_step_func=forward_step_func,
        model=model,
        process_non_loss_data_func=process_non_loss_data_func,
        config=config,
        non_loss_data_func=non_loss_data_func,
    )


def _evaluate_at_the_end(
    args: Any, evaluation: Callable[..., bool], iteration: int, iterators: dict[str, DataIterators]
) -> None:
    """Each split of ``iterators`` that is asked for, unless the loop has just evaluated it.

    ``evaluation`` is :func:`evaluate_and_print_results` of this model.
    """
    # Without a step, the points of this iteration are those of the run that made it.
    has_trained = iteration > args.iteration
    for split, iterator in iterators.items():
        wanted = args.do_test if split == "test" else args.do_valid and args.validated_iteration != iteration
        if wanted:
            cut_short = evaluation(
                f"iteration {iteration} on {split} set",
                data_iterator=iterator,
                iteration=iteration,
                verbose=True,
                write_to_tensorboard=has_trained,
                split=split,
            )
            if cut_short and (number := signal_of_any_rank()):
                print_exit_after(number)
                return


def train(
    forward_step_func: Callable,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    train_data_iterator: DataIterators,
    valid_data_iterator: DataIterators,
    process_non_loss_data_func: Callable | None,
    config: Any,
    checkpointing_context: dict,
    non_loss_data_func: Callable | None,
) -> tuple[int, float]:
    """Iterate until ``--train-iters``, or until one of the exit conditions holds.

    Returns:
        (last iteration, floating-point operations of all runs so far).
    """
    args, timers = get_args(), get_timers()
    set_points_aside(args)
    write_args_to_tensorboard()
    for chunk in model:
        chunk.train()
    config = schedule_config(config, model, optimizer)
    evaluation = _evaluation(forward_step_func, model, process_non_loss_data_func, config, non_loss_data_func)
    save = _saving(model, optimizer, opt_param_scheduler, checkpointing_context, train_data_iterator)
    iteration, flops = args.iteration, args.num_floating_point_operations_so_far
    log = LoopLog(args, model, optimizer)
    must_exit = False
    print_datetime("before the start of training step")
    timers("interval-time", log_level=0).start(barrier=True)

    with StepHooks(args, model, iteration) as hooks:
        while iteration < args.train_iters and not must_exit:
            hooks.before_step(iteration)
            if _batch_size_grew(args, iteration) and args.save:
                save(iteration, num_floating_point_operations_so_far=flops)
            get_rerun_state_machine().current_iteration = args.curr_iteration = iteration
            if iteration in args.iterations_to_skip:
                dummy_train_step(train_data_iterator)
                iteration += 1
                args.skipped_train_samples += _count_consumed_samples(args)
                continue
            result = train_step(
                forward_step_func, train_data_iterator, model, optimizer, opt_param_scheduler, config
            )
            iteration += 1
            flops += num_floating_point_operations(args, _count_consumed_samples(args))
            args.num_floating_point_operations_so_far = flops
            log.write(iteration, result)
            if _evaluation_is_due(args, iteration):
                _validate(args, evaluation, valid_data_iterator, iteration)
            hooks.after_step(iteration)
            must_exit = checkpoint_and_decide_exit(
                model,
                optimizer,
                opt_param_scheduler,
                iteration,
                num_floating_point_operations_so_far=flops,
                checkpointing_context=checkpointing_context,
                train_data_iterator=train_data_iterator,
            )
    log.close()
    if must_exit:
        name_flags_unread_by_script()
        flush_writers()
        sys.exit(0)
    return iteration, flops


def _validate(
    args: Any, evaluation: Callable[..., bool], data_iterator: DataIterators, iteration: int
) -> None:
    """Evaluate after a step, outside the interval that counts as training time.

    After the last step this is the final validation too: another one would give a second figure for the same
    iteration.
    """
    timers = get_timers()
    timers("interval-time").stop()
    where = " on validation set" if iteration == args.train_iters else ""
    cut_short = evaluation(
        f"iteration {iteration}{where}", data_iterator=data_iterator, iteration=iteration, split="validation"
    )
    args.validated_iteration = None if cut_short else iteration
    timers("interval-time", log_level=0).start(barrier=True)


def _batch_size_grew(args: Any, iteration: int) -> bool:
    """Move the batch-size ramp to the samples consumed so far; True when that changed the batch."""
    before = get_num_microbatches()
    update_num_microbatches(args.consumed_train_samples, consistency_check=False, verbose=True)
    grew = get_num_microbatches() != before and iteration != 0
    update_num_microbatches(args.consumed_train_samples, consistency_check=True, verbose=True)
    return grew


def _count_consumed_samples(args: Any) -> int:
    """Add the batch just taken to the sample counts; returns its size.

    A batch rounded down to fit the data-parallel size leaves samples behind; they count as skipped.
    """
    batch_size = args.data_parallel_size * args.micro_batch_size * get_num_microbatches()
    args.consumed_train_samples += batch_size
    args.skipped_train_samples += get_current_global_batch_size() - get_current_running_global_batch_size()
    return batch_size


def _evaluation_is_due(args: Any, iteration: int) -> bool:
    return bool(args.eval_interval) and iteration % args.eval_interval == 0 and args.do_valid


def dummy_train_step(data_iterator: DataIterators) -> None:
    """Take the micro-batches of one step and drop them, on the ranks that read."""
    machine = get_rerun_state_machine()
    iterators = data_iterator if isinstance(data_iterator, list) else [data_iterator]
    while machine.should_run_forward_backward(data_iterator):
        for _ in range(get_num_microbatches()):
            for iterator in iterators:
                if iterator is not None:
                    next_sample(iterator)


class StepResult(NamedTuple):
    """What :func:`train_step` returns."""

    losses: dict[str, torch.Tensor]
    """By name; empty when the update was skipped."""
    skipped: int
    """1 when the update was skipped, else 0."""
    must_checkpoint: bool
    must_exit: bool
    exit_code: int
    grad_norm: float | None
    num_zeros_in_grad: float | None


def train_step(
    forward_step_func: Callable,
    data_iterator: DataIterators,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    config: Any,
) -> StepResult:
    """One step: gradients of all micro-batches, one update.

    Args:
        config: of the schedule, see ``schedule_config``.
    """
    args, timers = get_args(), get_timers()
    machine = get_rerun_state_machine()
    reports: list[dict[str, Any]] = []
    while machine.should_run_forward_backward(data_iterator):
        for chunk in model:
            # What torch knows as a module is a data-parallel wrapper here.
            chunk.zero_grad_buffer()  # pyright: ignore[reportCallIssue]
        # A repeated step must not count twice.
        MTPLossLoggingHelper.clean_loss_in_tracker()
        optimizer.zero_grad()
        timers("forward-backward", log_level=1).start(barrier=args.barrier_with_L1_time)
        reports = get_forward_backward_func()(
            forward_step_func=forward_step_func,
            data_iterator=data_iterator,
            model=model,
            num_microbatches=get_num_microbatches(),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.decoder_seq_length,
            config=config,
        )
        timers("forward-backward").stop()
    must_checkpoint, must_exit, exit_code = machine.should_checkpoint_and_exit()
    if must_exit:
        return StepResult({}, 1, must_checkpoint, must_exit, exit_code, None, None)

    if args.empty_unused_memory_level >= 1:
        accelerator.empty_cache()
    timers("optimizer", log_level=1).start(barrier=args.barrier_with_L1_time)
    succeeded, grad_norm, num_zeros = optimizer.step()
    timers("optimizer").stop()
    succeeded = logical_and_across_model_parallel_group(succeeded)
    grad_norm = reduce_max_stat_across_model_parallel_group(grad_norm)
    if args.log_num_zeros_in_grad:
        num_zeros = reduce_max_stat_across_model_parallel_group(num_zeros)
    if succeeded:
        opt_param_scheduler.step(
            increment=get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
        )
    if args.empty_unused_memory_level >= 2:
        accelerator.empty_cache()
    losses = average_reports(reports)
    skipped = int(not succeeded)
    return StepResult(losses, skipped, must_checkpoint, must_exit, exit_code, grad_norm, num_zeros)


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def destroy_global_state() -> None:
    """Forget everything that a process can have only one of, so that another run can begin in it."""
    destroy_global_vars()
    parallel_state.destroy_model_parallel()
    destroy_rerun_state_machine()
