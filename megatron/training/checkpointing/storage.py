"""Which rank does what with the files of a checkpoint, where ranks share a directory and where they do not.

Ranks that differ only in their data or context hold the same state; one of them writes it. Where hosts have
disks of their own, each disk gets every file that a rank there will want to read, and a tracker.
"""

import os
import time
import uuid
from dataclasses import dataclass

import torch

from megatron.core import parallel_state
from megatron.core.errors import CheckpointError
from megatron.training.agreement import extremes, failing_together, world_size

# A network file system may show a new name late.
_LOOKS, _PAUSE_S = 5, 0.2


@dataclass(frozen=True)
class Role:
    """A rank's part in a save.

    Attributes:
        writes: whether it writes the model file of its place.
        publishes: whether it renames what the ranks of its storage wrote, and moves the tracker there.
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
    wishes: list[tuple[int, str]] = [own] * world_size()
    torch.distributed.all_gather_object(wishes, own)
    return Role(writes=wishes.index(own) == rank, publishes=rank == owner)


def lowest_rank_that_shares(directory: str) -> int:
    """The lowest of the ranks whose ``directory`` is the one that this rank sees. Takes all ranks.

    The first rank of each host leaves a mark there, and everybody reads the marks.

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
        if lowest != highest:  # really other disks, or a file system that is behind?
            with failing_together():
                time.sleep(_LOOKS * _PAUSE_S)
                owner = _lowest_mark(directory, token[0])
    finally:
        # All have looked: the end of the context before is a barrier.
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
    for look in range(_LOOKS):
        if look:
            time.sleep(_PAUSE_S)
        entries = os.listdir(directory) if os.path.isdir(directory) else []
        ranks = [int(entry.removeprefix(prefix)) for entry in entries if entry.startswith(prefix)]
        if ranks:
            return min(ranks)
    raise CheckpointError(
        f"{directory} is not the directory that the first rank of this host writes: mount the same one for "
        "all ranks of a host"
    )
