"""Which ranks of this run see the same data files."""

import os
import zlib
from argparse import Namespace

import torch

from megatron.core.errors import CheckpointError
from megatron.training.checkpointing.publishing import lowest_rank_that_shares


def storage_domain(args: Namespace, prefixes: list[str]) -> int:
    """A number that is equal on ranks which share the index cache, found out once per run.

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
        known = args.storage_domain = _find_out(args, prefixes)
    return known


def _find_out(args: Namespace, prefixes: list[str]) -> int:
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
