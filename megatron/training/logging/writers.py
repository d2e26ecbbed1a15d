"""Scalars of one iteration, sent to TensorBoard and W&B under the tags of the original."""

from argparse import Namespace
from typing import Any

from megatron.core import accelerator
from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer


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
