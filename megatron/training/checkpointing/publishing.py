"""Writing a checkpoint from all ranks at once: every file is written aside, and all are renamed together.

Ranks exchange their success after each phase, so that one that cannot write stops all of them, with its own
message, while the previous checkpoint is still the latest. Ranks that differ only in their data or context
hold the same state; one of them writes it. Where hosts have disks of their own, each disk gets every file
that a rank there will read, and a tracker.
"""

import os
import shutil
import threading
import time
import uuid
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.errors import CheckpointError
from megatron.training import stop_signals
from megatron.training.agreement import extremes, failing_together, world_size
from megatron.training.checkpointing import durable, layout
from megatron.training.checkpointing.state import to_host


def write_together(
    state: dict[str, Any],
    optimizer_shards: Any | None,
    save_dir: str,
    iteration: int,
    name: str,
) -> None:
    """Write this rank's files aside; when all ranks have, rename them and update the tracker.

    Args:
        state: content of ``model_optim_rng.pt``; written by one of the ranks that share ``name``.
        optimizer_shards: content of ``distrib_optim.pt`` on the rank that gathered it, else None.
        save_dir: the save directory.
        iteration: number of finished iterations.
        name: final path of the model file.

    Raises:
        CheckpointError: a rank cannot write; the same on all ranks.
    """
    final = layout.iteration_directory(save_dir, iteration)
    staging = durable.staging_directory(final)
    role = role_in_save(save_dir, name)
    try:
        with failing_together():
            if role.publishes:
                durable.remove_leftovers(save_dir)
        with failing_together():
            if role.writes:
                _write_aside(state, name, final, staging)
            if optimizer_shards is not None:
                beside = layout.get_distributed_optimizer_checkpoint_name(name)
                _write_aside(optimizer_shards, beside, final, staging)
        with failing_together(), stop_signals.held_back():
            if role.publishes:
                durable.publish(staging, final)
        with failing_together(), stop_signals.held_back():
            if role.publishes:
                layout.write_tracker(save_dir, iteration)
    except BaseException:
        if role.publishes:
            shutil.rmtree(staging, ignore_errors=True)
        raise


def _write_aside(content: Any, name: str, final: str, staging: str) -> None:
    host_content = to_host(content)
    target = os.path.join(staging, os.path.relpath(name, final))
    durable.write_file(target, lambda file: torch.save(host_content, file))


def cleanup_old_non_persistent_checkpoint(
    save_dir: str, leave_ckpt_num: int = 1, do_async: bool = False
) -> None:
    """Deletes all iterations in ``save_dir`` but the newest; on rank 0, other ranks do nothing.

    Args:
        leave_ckpt_num: how many are left.
        do_async: delete while the caller goes on.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    iterations = layout.saved_iterations(save_dir)
    old = [
        layout.iteration_directory(save_dir, each) for each in iterations[: len(iterations) - leave_ckpt_num]
    ]

    def delete() -> None:
        for directory in old:
            shutil.rmtree(directory, ignore_errors=True)

    if do_async:
        threading.Thread(target=delete).start()
    else:
        delete()


# A network file system may show a new name late: number of attempts, and time between them.
_ATTEMPTS, _PAUSE_S = 5, 0.2


@dataclass(frozen=True)
class Role:
    """A rank's part in a save.

    Attributes:
        writes: whether it writes the model file of its model-parallel rank.
        publishes: whether it renames what the ranks of its storage wrote, and updates the tracker there.
    """

    writes: bool
    publishes: bool


def role_in_save(save_dir: str, name: str) -> Role:
    """This rank's part in saving under ``save_dir``. Takes all ranks.

    Args:
        save_dir: the save directory.
        name: path of this rank's model file.
    """
    if world_size() == 1:
        return Role(writes=True, publishes=True)
    rank, owner = torch.distributed.get_rank(), lowest_rank_that_shares(save_dir)
    lowest, highest = extremes(owner)
    if lowest == highest:
        return Role(writes=parallel_state.get_expert_data_parallel_rank() == 0, publishes=rank == owner)
    own = (owner, os.path.relpath(name, save_dir))
    wanted: list[tuple[int, str]] = [own] * world_size()
    torch.distributed.all_gather_object(wanted, own)
    return Role(writes=wanted.index(own) == rank, publishes=rank == owner)


def lowest_rank_that_shares(directory: str) -> int:
    """The lowest of the ranks whose ``directory`` is the one that this rank sees. Takes all ranks.

    The first rank of each host leaves a mark there, and all ranks read the marks.

    Raises:
        CheckpointError: the directory cannot be written or read.
    """
    token = [uuid.uuid4().hex]
    torch.distributed.broadcast_object_list(token, src=0)
    mark = os.path.join(directory, f".shared_by.{token[0]}.{torch.distributed.get_rank()}")
    leaves_mark = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        with failing_together():
            if leaves_mark:
                _write_mark(directory, mark)
        with failing_together():
            owner = _lowest_mark(directory, token[0])
        lowest, highest = extremes(owner)
        if lowest != highest:  # other disks, or a file system that lags?
            with failing_together():
                time.sleep(_ATTEMPTS * _PAUSE_S)
                owner = _lowest_mark(directory, token[0])
    finally:
        # All ranks have read the marks: the end of the context before is a barrier.
        if leaves_mark and os.path.exists(mark):
            os.unlink(mark)
    return owner


def _write_mark(directory: str, mark: str) -> None:
    try:
        os.makedirs(directory, exist_ok=True)
        with open(mark, "w"):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write into {directory}: {error.strerror}. Give --save a directory that this user can "
            "write; checkpoints that were complete before are untouched."
        ) from error


def _lowest_mark(directory: str, token: str) -> int:
    prefix = f".shared_by.{token}."
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S)
        entries = os.listdir(directory) if os.path.isdir(directory) else []
        ranks = [int(entry.removeprefix(prefix)) for entry in entries if entry.startswith(prefix)]
        if ranks:
            return min(ranks)
    raise CheckpointError(
        f"{directory} is not the directory that the first rank of this host writes: mount the same one for "
        "all ranks of a host"
    )
