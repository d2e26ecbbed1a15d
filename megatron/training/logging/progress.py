"""progress.txt in the save directory: one line per start and per checkpoint (``--log-progress``)."""

import os
from argparse import Namespace
from datetime import datetime

from megatron.training.global_vars import get_args
from megatron.training.utils import append_to_progress_log, rounded

_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


def append_start_line(args: Namespace) -> None:
    """Note that a job started."""
    if args.log_progress:
        append_to_progress_log("Starting job")


def append_checkpoint_line(args: Namespace, iteration: int, flops_so_far: float) -> None:
    """Note a saved checkpoint with the throughput of this job, and of all jobs so far on as many devices."""
    now = datetime.now()
    job_seconds = now.timestamp() - args.process_start_time
    job_flops = flops_so_far - getattr(args, "num_floating_point_operations_at_start", 0.0)
    started, flops_at_start = _start_of_series(args.save, args.world_size)
    total_seconds = (now - started).total_seconds() if started else job_seconds
    append_to_progress_log(
        "\t".join(
            (
                "Saved checkpoint",
                f"Iteration: {iteration}",
                f"Job throughput: {_throughput(job_flops, job_seconds, args.world_size)}",
                "Cumulative throughput: "
                f"{_throughput(flops_so_far - flops_at_start, total_seconds, args.world_size)}",
                f"Floating-point operations: {flops_so_far:.2e}",
                f"Tokens (in billions): {rounded(args.consumed_train_samples * args.seq_length / 1e9, 2)}",
            )
        )
    )


def _throughput(operations: float, seconds: float, devices: int) -> str:
    return f"{rounded(operations / (max(seconds, 1e-6) * 1e12 * devices), 1)} TFLOP/s/GPU"


def _start_of_series(save_dir: str, world_size: int) -> tuple[datetime | None, float]:
    """When the series of jobs on ``world_size`` devices that goes on now began, and the operations before it.

    A job on another number of devices ends a series: its throughput cannot be averaged with that of others.
    """
    path = os.path.join(save_dir, "progress.txt")
    started, operations_at_start, operations = None, 0.0, 0.0
    if not os.path.exists(path):
        return None, 0.0
    with open(path) as progress:
        for line in progress:
            fields = line.rstrip("\n").split("\t")
            if len(fields) < 4:
                continue
            stamp, devices, event = fields[0], fields[2], fields[3]
            saved = [field for field in fields if field.startswith("Floating-point operations: ")]
            if saved:
                operations = float(saved[0].split(": ")[1])
            if devices != f"# GPUs: {world_size}":
                started = None
            elif event == "Starting job" and started is None:
                started, operations_at_start = datetime.strptime(stamp, _TIME_FORMAT), operations
    return started, operations_at_start if started else 0.0


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def compute_throughputs_and_append_to_progress_log(
    iteration: int, num_floating_point_operations_so_far: float
) -> None:
    """:func:`append_checkpoint_line` of the run's own arguments; nothing without ``--save``."""
    args = get_args()
    if args.save is not None:
        append_checkpoint_line(args, iteration, num_floating_point_operations_so_far)


def get_start_time_from_progress_log() -> tuple[datetime | None, float]:
    """:func:`_start_of_series` of the run's own arguments."""
    args = get_args()
    return _start_of_series(args.save, args.world_size)
