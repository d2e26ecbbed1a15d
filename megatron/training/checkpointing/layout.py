"""Directories and files of a checkpoint: their names, what is found on disk, and the tracker file.

::

    SAVE/latest_checkpointed_iteration.txt     iteration of the latest checkpoint, or the word "release"
    SAVE/iter_0000004/mp_rank_00/model_optim_rng.pt

A name depends on the model-parallel ranks alone; those that a caller leaves out come from ``parallel_state``.
"""

import os
import socket
import zipfile
from collections.abc import Callable, Iterator

import torch

from megatron.core import parallel_state
from megatron.core.errors import CheckpointError
from megatron.training.agreement import extremes, failing_together
from megatron.training.checkpointing import durable

MODEL_FILE = "model_optim_rng.pt"
DISTRIBUTED_OPTIMIZER_FILE = "distrib_optim.pt"
RELEASE = "release"
_NON_PERSISTENT_CKPT_SUBDIR = "non_persistent"


def rank_or_size(getter: Callable[[], int], default: int) -> int:
    """A rank or size of ``parallel_state``, or ``default`` in a process without process groups."""
    try:
        return getter()
    except AssertionError:
        if torch.distributed.is_initialized():
            raise
        return default


def iteration_directory(checkpoints_path: str, iteration: int, release: bool = False) -> str:
    """Directory of one checkpoint inside the save directory."""
    return os.path.join(checkpoints_path, RELEASE if release else f"iter_{iteration:07d}")


def rank_directory(tensor_rank: int, pipeline_rank: int | None, expert_rank: int | None) -> str:
    """Directory of one model-parallel rank; None leaves that part of the name out.

    >>> rank_directory(1, 2, None)
    'mp_rank_01_002'
    """
    parts = [f"mp_rank_{tensor_rank:02d}"]
    parts += [f"{rank:03d}" for rank in (pipeline_rank, expert_rank) if rank is not None]
    return "_".join(parts)


def get_checkpoint_name(
    checkpoints_path: str,
    iteration: int,
    release: bool = False,
    pipeline_parallel: bool | None = None,
    tensor_rank: int | None = None,
    pipeline_rank: int | None = None,
    expert_parallel: bool | None = None,
    expert_rank: int | None = None,
    return_base_dir: bool = False,
    basename: str = MODEL_FILE,
) -> str:
    """Path of the file of one model-parallel rank, or of the iteration directory.

    Args:
        checkpoints_path: the save or load directory.
        iteration: iteration number.
        release: the released weights instead of an iteration.
        pipeline_parallel: whether there is more than one pipeline stage; None asks ``parallel_state``,
            as for every other argument that follows.
        tensor_rank: tensor-parallel rank, or the expert tensor-parallel one if there are more of these.
        pipeline_rank: pipeline stage.
        expert_parallel: whether experts are spread over ranks.
        expert_rank: expert-parallel rank.
        return_base_dir: stop at the iteration directory.
        basename: name of the file.
    """
    base = iteration_directory(checkpoints_path, iteration, release)
    if return_base_dir:
        return base
    if pipeline_parallel is None:
        pipeline_parallel = rank_or_size(parallel_state.get_pipeline_model_parallel_world_size, 1) > 1
    if tensor_rank is None:
        tensor_rank = _tensor_rank()
    if pipeline_rank is None:
        pipeline_rank = rank_or_size(parallel_state.get_pipeline_model_parallel_rank, 0)
    if expert_parallel is None:
        expert_parallel = rank_or_size(parallel_state.get_expert_model_parallel_world_size, 1) > 1
    if expert_rank is None:
        expert_rank = rank_or_size(parallel_state.get_expert_model_parallel_rank, 0)
    directory = rank_directory(
        tensor_rank, pipeline_rank if pipeline_parallel else None, expert_rank if expert_parallel else None
    )
    return os.path.join(base, directory, basename)


def _tensor_rank() -> int:
    """The tensor-parallel rank, or the expert tensor-parallel one where experts are cut into more parts.

    The larger of both sizes is a multiple of the other, so its rank tells the other one too.
    """
    if rank_or_size(parallel_state.get_expert_tensor_parallel_world_size, 1) > rank_or_size(
        parallel_state.get_tensor_model_parallel_world_size, 1
    ):
        return rank_or_size(parallel_state.get_expert_tensor_parallel_rank, 0)
    return rank_or_size(parallel_state.get_tensor_model_parallel_rank, 0)


def get_distributed_optimizer_checkpoint_name(model_checkpoint_name: str) -> str:
    """Path of the distributed optimizer's file beside a rank's model file."""
    return os.path.join(os.path.dirname(model_checkpoint_name), DISTRIBUTED_OPTIMIZER_FILE)


def find_checkpoint_rank_0(checkpoints_path: str, iteration: int, release: bool = False) -> str | None:
    """File of rank 0 under any parallel layout, or the directory of a distributed checkpoint, or None."""
    for pipeline_parallel, expert_parallel in ((False, False), (False, True), (True, False), (True, True)):
        name = get_checkpoint_name(
            checkpoints_path,
            iteration,
            release,
            pipeline_parallel=pipeline_parallel,
            tensor_rank=0,
            pipeline_rank=0,
            expert_parallel=expert_parallel,
            expert_rank=0,
        )
        if os.path.isfile(name):
            return name
    base = iteration_directory(checkpoints_path, iteration, release)
    return base if disk_format(base) in ("torch_dist", "torch_dcp") else None


def disk_format(directory: str) -> str | None:
    """Format of the checkpoint in an iteration directory: torch_dist, torch, torch_dcp, or None."""
    if os.path.isfile(os.path.join(directory, "metadata.json")):
        return "torch_dist"
    entries = os.listdir(directory) if os.path.isdir(directory) else []
    if any(entry.startswith("mp_rank_0") for entry in entries):
        return "torch"
    return "torch_dcp" if ".metadata" in entries else None


def saved_iterations(checkpoints_path: str) -> list[int]:
    """Iterations that have a directory, complete or not, ascending."""
    if not os.path.isdir(checkpoints_path):
        return []
    names = [name for name in os.listdir(checkpoints_path) if name.startswith("iter_")]
    return sorted(int(name[5:]) for name in names if name[5:].isdecimal())


def complete_iterations(checkpoints_path: str) -> list[int]:
    """Iterations all of whose files are whole: a zip archive cut short has lost its table of contents."""

    def complete(iteration: int) -> bool:
        base = iteration_directory(checkpoints_path, iteration)
        if disk_format(base) != "torch":
            return disk_format(base) == "torch_dist"
        files = list(rank_files(base))
        return bool(files) and all(zipfile.is_zipfile(file) for file in files)

    return [iteration for iteration in saved_iterations(checkpoints_path) if complete(iteration)]


def rank_files(directory: str) -> Iterator[str]:
    """Model files of all ranks in an iteration directory of format torch."""
    for entry in sorted(os.listdir(directory)):
        path = os.path.join(directory, entry, MODEL_FILE)
        if entry.startswith("mp_rank_") and os.path.isfile(path):
            yield path


def advice_on_other_iterations(checkpoints_path: str, unusable: int | None = None) -> str:
    """Sentence that says which complete checkpoints ``--ckpt-step`` could load instead."""
    others = [iteration for iteration in complete_iterations(checkpoints_path) if iteration != unusable]
    if not others:
        other = "" if unusable is None else "other "
        return f"No {other}complete checkpoint is in {checkpoints_path}."
    shown = ", ".join(map(str, others[-8:]))
    more = f" (and {len(others) - 8} older)" if len(others) > 8 else ""
    return f"Complete checkpoints found: {shown}{more}; load one with --ckpt-step {others[-1]}."


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


def read_together(tracker_filename: str) -> tuple[int, bool] | None:
    """Read the tracker as :func:`read_metadata` does; None where no rank finds the file. Takes all ranks.

    A rank may see an older tracker, or none, over a file system that lags, or on a disk of its own; the
    highest iteration is used, and a rank that sees another prints a warning.
    """
    with failing_together():
        own = read_tracker(tracker_filename) if os.path.isfile(tracker_filename) else None
    number = -1 if own is None else own[0]
    _, highest = extremes(number)
    if number != highest:
        seen = "is missing" if number < 0 else f"says iteration {number}"
        print(
            f"WARNING: on rank {torch.distributed.get_rank()} ({socket.gethostname()}) {tracker_filename} "
            f"{seen}, another rank's says {highest or RELEASE}, which is used",
            flush=True,
        )
    return None if highest < 0 else (highest, highest == 0)


def read_tracker(tracker_filename: str) -> tuple[int, bool]:
    """Iteration and release flag in this rank's tracker file; the iteration of a release is 0."""
    try:
        with open(tracker_filename, encoding="utf-8", errors="replace") as file:
            text = file.read().strip()
    except OSError as error:
        raise CheckpointError(f"cannot read {tracker_filename}: {error.strerror}") from error
    release = text == RELEASE
    if not release and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise CheckpointError(
            f"{tracker_filename} must hold a positive iteration number or the word release, found "
            f"{text[:40]!r}. " + advice_on_other_iterations(os.path.dirname(tracker_filename))
        )
    return (0 if release else int(text)), release


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def ensure_directory_exists(filename: str, check_parent: bool = True) -> None:
    """Create the directory ``filename``, or the one that is to hold it."""
    os.makedirs(os.path.dirname(filename) if check_parent else filename, exist_ok=True)


def _get_checkpoint_format(checkpoint_name: str) -> str:
    """Format of an iteration's directory, or of a rank's file in one.

    Raises:
        CheckpointError: there is no checkpoint there.
    """
    directory = checkpoint_name
    if os.path.isfile(checkpoint_name):
        directory = os.path.dirname(os.path.dirname(checkpoint_name))
    found = disk_format(directory)
    if found is None:
        raise CheckpointError(
            f"{checkpoint_name} is no checkpoint: it holds no {MODEL_FILE} and no metadata.json"
        )
    return found


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
