"""The tracker file: the one line that says which checkpoint of a directory is the latest."""

import os

import torch

from megatron.core import accelerator
from megatron.core.errors import CheckpointError
from megatron.training.checkpointing import durable, layout

TRACKER_FILE = "latest_checkpointed_iteration.txt"


def get_checkpoint_tracker_filename(checkpoints_path: str) -> str:
    """Path of the tracker file of a save directory."""
    return os.path.join(checkpoints_path, TRACKER_FILE)


def checkpoint_exists(checkpoints_path: str | None) -> bool:
    """True if the directory has a tracker file."""
    return checkpoints_path is not None and os.path.isfile(get_checkpoint_tracker_filename(checkpoints_path))


def write_tracker(checkpoints_path: str, iteration: int) -> None:
    """Make ``iteration`` the latest; a crash leaves the old tracker or the new one, never a mixture."""
    durable.replace_file(get_checkpoint_tracker_filename(checkpoints_path), str(iteration).encode())


def read_metadata(tracker_filename: str) -> tuple[int, bool]:
    """Iteration and release flag from a tracker file; the highest iteration where ranks disagree.

    Returns:
        ``(iteration, release)``; the iteration of a release is 0.

    Raises:
        CheckpointError: the file holds neither a positive integer nor ``release``.
    """
    directory = os.path.dirname(tracker_filename)
    try:
        with open(tracker_filename, encoding="utf-8", errors="replace") as file:
            text = file.read().strip()
    except OSError as error:
        raise CheckpointError(f"cannot read {tracker_filename}: {error.strerror}") from error
    release = text == layout.RELEASE
    if not release and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise CheckpointError(
            f"{tracker_filename} must hold a positive iteration number or the word release, found "
            f"{text[:40]!r}. " + layout.advice_on_other_iterations(directory)
        )
    iteration = 0 if release else int(text)
    return _highest_of_all_ranks(iteration, tracker_filename), release


def _highest_of_all_ranks(iteration: int, tracker_filename: str) -> int:
    """Ranks may read the tracker over a file system that lags on some machines."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return iteration
    highest = torch.tensor([iteration], dtype=torch.long, device=accelerator.current_device())
    torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX)
    if int(highest) != iteration:
        print(
            f"WARNING: on rank {torch.distributed.get_rank()} {tracker_filename} says iteration {iteration}, "
            f"other ranks say {int(highest)}, which is used",
            flush=True,
        )
    return int(highest)
