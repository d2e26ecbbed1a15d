"""Checkpoints as artifacts of a Weights & Biases run; nothing happens on ranks without a run."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from megatron.training.global_vars import get_wandb_writer

# Of an artifact's name; the service refuses longer ones.
LONGEST_NAME = 128


def on_save_checkpoint_success(
    checkpoint_path: str, tracker_filename: str, save_dir: str, iteration: int
) -> None:
    """Log a saved checkpoint: a reference to its directory and a copy of the tracker file.

    Args:
        checkpoint_path: directory of the iteration.
        tracker_filename: file that names the latest iteration.
        save_dir: the save directory; the artifact is called after it.
        iteration: iteration that was saved.
    """
    wandb = get_wandb_writer()
    if wandb is None:
        return
    with _failures_reported(f"checkpoint {checkpoint_path} is saved, but not logged as an artifact"):
        artifact = wandb.Artifact(_artifact_name(save_dir), type="model", metadata={"iteration": iteration})
        # By reference: checkpoints are large, and stay where they are.
        artifact.add_reference(f"file://{os.path.abspath(checkpoint_path)}", checksum=False)
        artifact.add_file(tracker_filename)
        wandb.run.log_artifact(artifact, aliases=[_alias(checkpoint_path)])


def on_load_checkpoint_success(checkpoint_path: str, load_dir: str) -> None:
    """Note that this run goes on from a checkpoint that an earlier one of its project logged.

    Args:
        checkpoint_path: directory of the iteration.
        load_dir: the directory it was found in.
    """
    wandb = get_wandb_writer()
    if wandb is None:
        return
    name = f"{_artifact_name(load_dir)}:{_alias(checkpoint_path)}"
    with _failures_reported(f"checkpoint {checkpoint_path} is loaded, but not noted as artifact {name}"):
        wandb.run.use_artifact(name)


@contextmanager
def _failures_reported(what: str) -> Iterator[None]:
    """Print what went wrong and go on: a service that is away must not end a training run.

    The errors of ``wandb`` have no common class: a run without network raises ``TypeError``, for one.
    """
    try:
        yield
    except Exception as error:
        print(f"WARNING: {what} of the Weights & Biases run: {error}", flush=True)


def _artifact_name(directory: str) -> str:
    """Name of a directory's artifact: its last two parts, joined, in the letters the service accepts."""
    name = "-".join(os.path.abspath(directory).strip(os.sep).split(os.sep)[-2:])
    return re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[-LONGEST_NAME:]


def _alias(checkpoint_path: str) -> str:
    """Name of one checkpoint among those of its artifact: its directory's own."""
    return os.path.basename(os.path.normpath(checkpoint_path))
