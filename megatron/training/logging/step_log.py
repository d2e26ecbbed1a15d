"""The log line of an iteration, everything that is counted for it, and its points in TensorBoard and W&B.

Log parsers written for Megatron-LM rely on the order, widths and tags of the fields.
"""

import math
import os
from argparse import Namespace
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch

from megatron.core import accelerator
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.utils import get_model_config
from megatron.training.global_vars import (
    get_args,
    get_tensorboard_writer,
    get_timers,
    get_wandb_writer,
)
from megatron.training.logging.expert_log import LoadLog, log_auxiliary_losses
from megatron.training.model_family import batch_shape, model_family, model_shape
from megatron.training.schedule_hooks import gathered_parameters
from megatron.training.theoretical_memory_usage import report_theoretical_memory
from megatron.training.utils import calc_params_l2_norm, is_rank0, print_rank_last, report_memory, rounded


def num_floating_point_operations(args: Namespace, batch_size: int) -> float:
    """Operations of forward and backward over ``batch_size`` sequences, as the model's family counts them."""
    return model_family(args).operations(model_shape(args), batch_shape(args, batch_size))


def write_scalar(tag: str, value: Any, iteration: int, samples: int | None = None) -> None:
    """Add one point to every writer of this rank.

    Args:
        tag: name of the curve.
        value: number or 0-dim tensor.
        iteration: x of the point.
        samples: also draw ``<tag> vs samples`` in TensorBoard at this x.
    """
    writer = get_tensorboard_writer()
    if writer is not None:
        writer.add_scalar(tag, value, iteration)
        if samples is not None:
            writer.add_scalar(f"{tag} vs samples", value, samples)
    wandb = get_wandb_writer()
    if wandb is not None:
        wandb.log({tag: float(value)}, iteration)


def write_step(args: Namespace, iteration: int, scalars: dict[str, float | None]) -> None:
    """Write the scalars of a step; None values are left out."""
    samples = args.consumed_train_samples
    for tag, value in scalars.items():
        if value is not None:
            write_scalar(tag, value, iteration, samples)
    wandb = get_wandb_writer()
    if wandb is not None:
        wandb.log({"samples vs steps": samples}, iteration)
    if args.log_memory_to_tensorboard:
        report = accelerator.memory_report()
        for tag, key in (
            ("mem-reserved-bytes", "reserved"),
            ("mem-allocated-bytes", "allocated"),
            ("mem-max-allocated-bytes", "max_allocated"),
            ("mem-allocated-count", "allocated_count"),
        ):
            if key in report:
                write_scalar(tag, report[key], iteration)


ADVANCED, SKIPPED, NAN = "advanced iterations", "skipped iterations", "nan iterations"
_SAMPLES = "samples"

# Timers of the report below an iteration line, in this order.
TIMERS_TO_LOG = [
    "forward-backward",
    "forward-compute",
    "backward-compute",
    "batch-generator",
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-forward-recv",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
    "layernorm-grads-all-reduce",
    "embedding-grads-all-reduce",
    "all-grads-sync",
    "params-all-gather",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-count-zeros",
    "optimizer-inner-step",
    "optimizer-copy-main-to-model-params",
    "optimizer",
]


@dataclass(frozen=True)
class StepFigures:
    """What one iteration produced, besides its losses."""

    learning_rate: float | None
    decoupled_learning_rate: float | None
    loss_scale: float
    grad_norm: float | None
    params_norm: float | None
    num_zeros_in_grad: float | None
    batch_size: int


def training_log(
    loss_dict: dict[str, torch.Tensor],
    total_loss_dict: dict[str, Any],
    learning_rate: float | None,
    decoupled_learning_rate: float | None,
    iteration: int,
    loss_scale: float,
    report_memory_flag: bool,
    skipped_iter: int,
    grad_norm: float | None,
    params_norm: float | None,
    num_zeros_in_grad: float | None,
) -> bool:
    """Count one iteration, write its points, and print the line when its interval is over.

    Args:
        loss_dict: losses of this iteration, empty when the step was skipped or on inner stages.
        total_loss_dict: sums since the last line; updated in place.
        report_memory_flag: True until the memory report has been printed once.

    Returns:
        The new ``report_memory_flag``.
    """
    args = get_args()
    figures = StepFigures(
        learning_rate=learning_rate,
        decoupled_learning_rate=decoupled_learning_rate,
        loss_scale=loss_scale,
        grad_norm=grad_norm,
        params_norm=params_norm,
        num_zeros_in_grad=num_zeros_in_grad,
        batch_size=args.micro_batch_size * args.data_parallel_size * get_num_microbatches(),
    )
    _accumulate(loss_dict, total_loss_dict, bool(skipped_iter), figures.batch_size)
    _note_further_losses(total_loss_dict, iteration, bool(skipped_iter))
    # Fewer than the interval in the first line after a checkpoint, and where iterations were passed over.
    counted = total_loss_dict[ADVANCED] + total_loss_dict[SKIPPED]
    if iteration % args.tensorboard_log_interval == 0:
        _write_points(args, iteration, figures, loss_dict, counted)
    if iteration % args.log_interval != 0:
        return report_memory_flag
    _print_line(args, iteration, figures, total_loss_dict, counted)
    total_loss_dict.clear()
    if report_memory_flag and learning_rate is not None:
        _report_memory_once(args, iteration)
        report_memory_flag = False
    get_timers().log(TIMERS_TO_LOG, normalizer=counted)
    return report_memory_flag


def explain_skipped_step(args: Namespace, iteration: int, loss_scale: float) -> None:
    """Print on the last rank why a step was skipped.

    Args:
        iteration: of the step.
        loss_scale: used in it.
    """
    if args.loss_scale is not None:
        advice = (
            f"--loss-scale {args.loss_scale:.1f} stays as it is: give a smaller one, or none to have it found"
        )
    else:
        advice = (
            f"the scale starts at --initial-loss-scale {args.initial_loss_scale:.1f} and is halved until "
            "gradients fit, so a fp16 run usually skips its first steps"
        )
    print_rank_last(
        f" step {iteration} skipped: gradients overflowed at loss scale {loss_scale:.1f}; {advice}"
    )


def _accumulate(
    loss_dict: dict[str, torch.Tensor], total: dict[str, Any], skipped: bool, batch_size: int
) -> None:
    for name in (ADVANCED, SKIPPED, NAN, _SAMPLES):
        total.setdefault(name, 0)
    total[_SAMPLES] += batch_size
    total[SKIPPED if skipped else ADVANCED] += 1
    total[NAN] += int(any(not math.isfinite(float(value)) for value in loss_dict.values()))
    if not skipped:
        for name, value in loss_dict.items():
            total[name] = total.get(name, 0.0) + float(value)


def _note_further_losses(total: dict[str, Any], iteration: int, skipped: bool) -> None:
    """Count and write the losses of layers that predict further tokens, on the ranks that have some."""
    MTPLossLoggingHelper.track_mtp_metrics(
        1 / get_num_microbatches(),
        iteration,
        get_tensorboard_writer(),
        get_wandb_writer(),
        None if skipped else total,
    )


def _write_points(
    args: Namespace, iteration: int, figures: StepFigures, losses: dict[str, Any], counted: int
) -> None:
    """Write the points of one iteration, and its timers, averaged over those since the last line."""
    if get_tensorboard_writer() is not None or get_wandb_writer() is not None:
        write_step(args, iteration, _scalars(args, figures, losses))
    if args.log_timers_to_tensorboard and args.tensorboard_dir:
        # On all ranks, although one alone has a writer: the slowest rank's times are written.
        writer = get_tensorboard_writer()
        get_timers().write(TIMERS_TO_LOG, writer, iteration, normalizer=counted, reset=False)


def _scalars(args: Namespace, figures: StepFigures, losses: dict[str, Any]) -> dict[str, Any]:
    """Points of this iteration by tag, in the order they are written."""
    scalars: dict[str, Any] = {"learning-rate": figures.learning_rate}
    if args.decoupled_lr is not None:
        scalars["decoupled-learning-rate"] = figures.decoupled_learning_rate
    if args.skipped_train_samples > 0:
        scalars["skipped-train-samples"] = args.skipped_train_samples
    scalars["batch-size"] = figures.batch_size
    scalars.update(losses)
    if args.log_loss_scale_to_tensorboard:
        scalars["loss-scale"] = figures.loss_scale
    if args.log_world_size_to_tensorboard:
        scalars["world-size"] = args.world_size
    scalars["grad-norm"] = figures.grad_norm
    scalars["num-zeros"] = figures.num_zeros_in_grad
    scalars["params-norm"] = figures.params_norm
    return scalars


def _print_line(
    args: Namespace, iteration: int, figures: StepFigures, total: dict[str, Any], counted: int
) -> None:
    """Print the line of an interval of ``counted`` iterations, and write the points that belong to it."""
    interval_s = get_timers()("interval-time").elapsed(barrier=True)
    seconds = interval_s / counted
    # The batch may have grown since the last line.
    operations = num_floating_point_operations(args, total[_SAMPLES])
    throughput = operations / (interval_s * 1e12 * args.world_size)
    if args.log_timers_to_tensorboard:
        write_scalar("iteration-time", seconds, iteration)
        if args.log_throughput:
            write_scalar("throughput", throughput, iteration)
    print_rank_last(_line(args, iteration, figures, total, seconds, throughput))


def _line(
    args: Namespace,
    iteration: int,
    figures: StepFigures,
    total: dict[str, Any],
    seconds: float,
    throughput: float,
) -> str:
    # The line as printed in 2023, for scripts that cut it at fixed columns.
    old_format = os.environ.get("MEGATRON_LOG_FORMAT") == "2023"
    fields = [
        f"iteration {iteration:8d}/{args.train_iters:8d}",
        f"consumed samples: {args.consumed_train_samples:12d}",
    ]
    if args.skipped_train_samples > 0:
        fields.append(f"skipped samples: {args.skipped_train_samples:12d}")
    fields.append(f"elapsed time per iteration (ms): {seconds * 1000.0:.1f}")
    if args.log_throughput:
        fields.append(f"throughput per GPU (TFLOP/s/GPU): {rounded(throughput, 1)}")
    if figures.learning_rate is not None:
        fields.append(f"learning rate: {figures.learning_rate:.{3 if old_format else 6}E}")
    if args.decoupled_lr is not None and figures.decoupled_learning_rate is not None:
        fields.append(f"decoupled learning rate: {figures.decoupled_learning_rate:.6E}")
    fields.append(f"global batch size: {figures.batch_size:5d}")
    for name, value in total.items():
        if name not in (ADVANCED, SKIPPED, NAN, _SAMPLES):
            average = value / max(total[ADVANCED], 1)
            if average > 0.0:
                fields.append(f"{name}: {average:.6E}")
    fields.append(f"loss scale: {figures.loss_scale:.1f}")
    if figures.grad_norm is not None:
        fields.append(f"grad norm: {figures.grad_norm:.3f}")
    if figures.num_zeros_in_grad is not None:
        fields.append(f"num zeros: {figures.num_zeros_in_grad:.1f}")
    if figures.params_norm is not None:
        fields.append(f"params norm: {figures.params_norm:.3f}")
    fields.append(f"number of skipped iterations: {total[SKIPPED]:3d}")
    fields.append(f"number of nan iterations: {total[NAN]:3d}")
    prefix = "" if old_format else f" [{datetime.now():%Y-%m-%d %H:%M:%S}]"
    return prefix + "".join(f" {field} |" for field in fields)


def _report_memory_once(args: Namespace, iteration: int) -> None:
    if is_rank0():
        report_theoretical_memory(args, num_microbatches=get_num_microbatches(), verbose=True)
    report_memory(f"(after {iteration} iterations)")


class LoopLog:
    """Collects the figures of every step of a run, and prints its log lines."""

    def __init__(self, args: Any, model: list[torch.nn.Module], optimizer: Any):
        self._args, self._model, self._optimizer = args, model, optimizer
        self._totals: dict[str, Any] = {}
        self._report_memory = True
        self._loss_scale = optimizer.get_loss_scale().item()
        self._steps = self._skipped = 0
        self._config = get_model_config(model[0])
        self._loads = LoadLog()

    def write(self, iteration: int, result: tuple[Any, ...]) -> None:
        """Count one step and print its line when that is due; all ranks call this together.

        ``result`` is what ``train_step`` returned.
        """
        losses, skipped, _, _, _, grad_norm, num_zeros = result
        used_scale, self._loss_scale = self._loss_scale, self._optimizer.get_loss_scale().item()
        self._steps += 1
        self._skipped += skipped
        if skipped and self._skipped == 1:
            explain_skipped_step(self._args, iteration, used_scale)
        params_norm = None
        if self._args.log_params_norm:
            with gathered_parameters(self._model):
                params_norm = calc_params_l2_norm(self._model)
        if self._config.num_moe_experts is not None:
            self._log_auxiliary_losses(losses, iteration, bool(skipped))
        self._report_memory = training_log(
            losses,
            self._totals,
            *_learning_rates(self._optimizer),
            iteration,
            self._loss_scale,
            self._report_memory,
            skipped,
            grad_norm,
            params_norm,
            num_zeros,
        )
        if self._config.log_moe_balance and iteration % self._args.log_interval == 0:
            self._loads.write(self._args, self._config, iteration)

    def _log_auxiliary_losses(self, losses: dict[str, Any], iteration: int, skipped: bool) -> None:
        for name in losses:
            # The main loss comes first in the line.
            self._totals.setdefault(name, 0.0)
        log_auxiliary_losses(
            self._config, iteration, None if skipped else self._totals, self._args.moe_per_layer_logging
        )

    def close(self) -> None:
        """Print a warning if all steps were skipped."""
        if self._steps and self._skipped == self._steps:
            print_rank_last(
                f"WARNING: all {self._steps} steps of this run were skipped, the weights are as before: "
                "train longer, or start at a smaller loss scale"
            )


def _learning_rates(optimizer: Any) -> tuple[float | None, float | None]:
    """Rates in force for the next step: (ordinary groups, decoupled groups)."""
    rates: dict[bool, float] = {}
    for group in optimizer.param_groups:
        rates[bool(group["is_decoupled_lr"])] = group["lr"]
    return rates.get(False), rates.get(True)
