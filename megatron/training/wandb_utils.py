"""Checkpoints as artifacts of a Weights & Biases run; nothing happens on ranks without a run."""

import os

from megatron.training.global_vars import get_wandb_writer

# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


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
    artifact = wandb.Artifact(_artifact_name(save_dir), type="model", metadata={"iteration": iteration})
    # By reference: checkpoints are large, and stay where they are.
    artifact.add_reference(f"file://{os.path.abspath(checkpoint_path)}", checksum=False)
    artifact.add_file(tracker_filename)
    wandb.run.log_artifact(artifact, aliases=[f"iter_{iteration:07d}"])


def on_load_checkpoint_success(checkpoint_path: str, load_dir: str) -> None:
    """Note that this run goes on from a checkpoint that an earlier one logged.

    Args:
        checkpoint_path: directory of the iteration.
        load_dir: the directory it was found in.
    """
    wandb = get_wandb_writer()
    if wandb is not None:
        alias = os.path.basename(os.path.normpath(checkpoint_path))
        wandb.run.use_artifact(f"{_artifact_name(load_dir)}:{alias}")


def _artifact_name(directory: str) -> str:
    """Name of a directory's artifact: its last two parts, joined."""
    return "-".join(os.path.abspath(directory).strip(os.sep).split(os.sep)[-2:])
