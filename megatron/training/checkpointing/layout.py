"""Where the parts of a checkpoint lie: directory and file names, and what is found on disk.

::

    SAVE/latest_checkpointed_iteration.txt     iteration, or the word "release"
    SAVE/iter_0000004/mp_rank_00/model_optim_rng.pt

A name depends on the place of a rank in the model-parallel grid alone, so these functions are pure once the
place is given; what is left out is asked from ``parallel_state``.
"""

import os
import zipfile
from collections.abc import Callable, Iterator

import torch

from megatron.core import parallel_state
from megatron.core.errors import CheckpointError

MODEL_FILE = "model_optim_rng.pt"
DISTRIBUTED_OPTIMIZER_FILE = "distrib_optim.pt"
RELEASE = "release"
_NON_PERSISTENT_CKPT_SUBDIR = "non_persistent"


def own_place(getter: Callable[[], int], alone: int) -> int:
    """A size or rank of ``parallel_state``, or ``alone`` in a process that belongs to no group."""
    try:
        return getter()
    except AssertionError:
        if torch.distributed.is_initialized():
            raise
        return alone


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
        tensor_rank: tensor-parallel rank.
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
        pipeline_parallel = own_place(parallel_state.get_pipeline_model_parallel_world_size, 1) > 1
    if tensor_rank is None:
        tensor_rank = own_place(parallel_state.get_tensor_model_parallel_rank, 0)
    if pipeline_rank is None:
        pipeline_rank = own_place(parallel_state.get_pipeline_model_parallel_rank, 0)
    if expert_parallel is None:
        expert_parallel = own_place(parallel_state.get_expert_model_parallel_world_size, 1) > 1
    if expert_rank is None:
        expert_rank = own_place(parallel_state.get_expert_model_parallel_rank, 0)
    place = rank_directory(
        tensor_rank, pipeline_rank if pipeline_parallel else None, expert_rank if expert_parallel else None
    )
    return os.path.join(base, place, basename)


def get_distributed_optimizer_checkpoint_name(model_checkpoint_name: str) -> str:
    """Path of the distributed optimizer's file beside a rank's model file."""
    return os.path.join(os.path.dirname(model_checkpoint_name), DISTRIBUTED_OPTIMIZER_FILE)


def ensure_directory_exists(filename: str, check_parent: bool = True) -> None:
    """Create the directory ``filename``, or the one that is to hold it."""
    os.makedirs(os.path.dirname(filename) if check_parent else filename, exist_ok=True)


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


def saved_iterations(checkpoints_path: str) -> list[int]:
    """Iterations that have a directory, complete or not, ascending."""
    if not os.path.isdir(checkpoints_path):
        return []
    names = [name for name in os.listdir(checkpoints_path) if name.startswith("iter_")]
    return sorted(int(name[5:]) for name in names if name[5:].isdecimal())


def complete_iterations(checkpoints_path: str) -> list[int]:
    """Iterations whose every file has its end: a zip archive cut short has lost its table of contents."""

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
