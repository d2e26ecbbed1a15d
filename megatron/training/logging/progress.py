"""progress.txt in the save directory: one line per start and per checkpoint (``--log-progress``)."""

import os
from argparse import Namespace
from datetime import datetime

from megatron.training.utils import append_to_progress_log

_TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


def append_start_line(args: Namespace) -> None:
    """Note that a job started."""
    if args.log_progress:
        append_to_progress_log("Starting job")


def append_checkpoint_line(args: Namespace, iteration: int, flops_so_far: float) -> None:
    """Note a saved checkpoint with the throughput of this job and of all jobs so far."""
    now = datetime.now()
    per_device = 1e12 * args.world_size
    job_seconds = max(now.timestamp() - args.process_start_time, 1e-6)
    started, flops_at_start = get_start_time_from_progress_log(args.save)
    total_seconds = max((now - started).total_seconds(), 1e-6) if started else job_seconds
    job_flops = flops_so_far - getattr(args, "num_floating_point_operations_at_start", 0.0)
    tokens = args.consumed_train_samples * args.seq_length / 1e9
    append_to_progress_log(
        "\t".join(
            (
                "Saved checkpoint",
                f"Iteration: {iteration}",
                f"Job throughput: {job_flops / (job_seconds * per_device):.1f} TFLOP/s/GPU",
                "Cumulative throughput: "
                f"{(flops_so_far - flops_at_start) / (total_seconds * per_device):.1f} TFLOP/s/GPU",
                f"Floating-point operations: {flops_so_far:.2e}",
                f"Tokens (in billions): {tokens:.2f}",
            )
        )
    )


def get_start_time_from_progress_log(save_dir: str) -> tuple[datetime | None, float]:
    """When the first job of this directory started, and the operations counted before it (0)."""
    path = os.path.join(save_dir, "progress.txt")
    if not os.path.exists(path):
        return None, 0.0
    with open(path) as progress:
        for line in progress:
            stamp, *fields = line.rstrip("\n").split("\t")
            if fields and fields[-1] == "Starting job":
                return datetime.strptime(stamp, _TIME_FORMAT), 0.0
    return None, 0.0
