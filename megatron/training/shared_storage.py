"""Which ranks of a run see the same files, where hosts may share a file system or have disks of their own."""

import os
import time
import uuid
import zlib
from argparse import Namespace

import torch

from megatron.core.errors import CheckpointError
from megatron.training.agreement import extremes, failing_together

# A network file system may show a new name late: number of attempts, and time between them.
_ATTEMPTS, _PAUSE_S = 5, 0.2


def storage_domain(args: Namespace, prefixes: list[str]) -> int:
    """A number that is equal on ranks that share the index cache, determined once per run.

    On one node all ranks share. ``--no-shared-storage`` gives every node a disk of its own. Otherwise the
    first rank of every node leaves a mark in the directory of the cache (or of the first data set), and each
    looks whose marks it sees; where the directory cannot be written, nodes count as separate, which costs no
    more than building the same index on each. All ranks call this together.

    Args:
        args: the arguments; the answer is kept as ``args.storage_domain``.
        prefixes: data sets of the run.
    """
    known = getattr(args, "storage_domain", None)
    if known is None:
        known = args.storage_domain = _determine(args, prefixes)
    return known


def _determine(args: Namespace, prefixes: list[str]) -> int:
    several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    directory = args.data_cache_path or (os.path.dirname(prefixes[0]) or "." if prefixes else None)
    if not several or directory is None:
        return 0
    nodes = _gather(_node())
    if len(set(nodes)) == 1:
        return 0
    if args.no_shared_storage:
        return nodes.index(_node())
    try:
        return lowest_rank_that_shares(directory)
    except CheckpointError:
        return nodes.index(_node())


def _node() -> int:
    """The launcher's number of this node, or one made from the host's name."""
    word = os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or ""
    return int(word) if word.isdigit() else zlib.crc32(os.uname().nodename.encode())


def _gather(number: int) -> list[int]:
    numbers = [number] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(numbers, number)
    return numbers


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
