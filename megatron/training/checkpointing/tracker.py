"""The tracker file: the one line that says which checkpoint of a directory is the latest."""

import os
import socket

import torch

from megatron.core.errors import CheckpointError
from megatron.training.agreement import extremes, failing_together
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
        CheckpointError: the file holds neither a positive integer nor ``release``, or is missing everywhere.
    """
    agreed = read_together(tracker_filename)
    if agreed is None:
        raise CheckpointError(f"cannot read {tracker_filename}: it does not exist")
    return agreed


def read_together(tracker_filename: str) -> tuple[int, bool] | None:
    """What :func:`read_metadata` returns, or None where no rank finds the file. Takes all ranks.

    A rank may see an older tracker, or none, over a file system that lags, or on a disk of its own; the
    highest iteration holds, and a rank that sees another says so.
    """
    with failing_together():
        own = read_tracker(tracker_filename) if os.path.isfile(tracker_filename) else None
    number = -1 if own is None else own[0]
    _, highest = extremes(number)
    if number != highest:
        seen = "is missing" if number < 0 else f"says iteration {number}"
        print(
            f"WARNING: on rank {torch.distributed.get_rank()} ({socket.gethostname()}) {tracker_filename} "
            f"{seen}, another rank's says {highest or layout.RELEASE}, which is used",
            flush=True,
        )
    return None if highest < 0 else (highest, highest == 0)


def read_tracker(tracker_filename: str) -> tuple[int, bool]:
    """Iteration and release flag that this rank's tracker file says; the iteration of a release is 0."""
    try:
        with open(tracker_filename, encoding="utf-8", errors="replace") as file:
            text = file.read().strip()
    except OSError as error:
        raise CheckpointError(f"cannot read {tracker_filename}: {error.strerror}") from error
    release = text == layout.RELEASE
    if not release and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise CheckpointError(
            f"{tracker_filename} must hold a positive iteration number or the word release, found "
            f"{text[:40]!r}. " + layout.advice_on_other_iterations(os.path.dirname(tracker_filename))
        )
    return (0 if release else int(text)), release
