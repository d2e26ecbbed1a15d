"""Who builds index caches where ranks share their files, and where they do not.

Ranks that see the same files form a storage domain. In each, one of the ranks that read the data builds and
writes the caches; the others load them. Copies of the data in different domains must be equal: every rank
shuffles for itself, and different data would give different samples without anybody noticing.
"""

import hashlib
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.errors import DataError

_READ_AT_ONCE = 2**24


@dataclass(frozen=True)
class Election:
    """Outcome of :func:`elect_builders`.

    Attributes:
        builds: whether this rank builds and writes.
        builders: all ranks that do, one per domain with readers.
    """

    builds: bool
    builders: tuple[int, ...]


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def elect_builders(domain: int, reads: bool) -> Election:
    """The lowest rank of every domain that reads data.  All ranks call this together.

    Args:
        domain: equal on ranks that see the same files.
        reads: whether this rank needs the data.
    """
    if not _distributed():
        return Election(builds=reads, builders=(0,) if reads else ())
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    answers: list[tuple[int, bool]] = [(domain, reads)] * world
    torch.distributed.all_gather_object(answers, (domain, reads))
    lowest: dict[int, int] = {}
    for other, (place, needs) in enumerate(answers):
        if needs:
            lowest.setdefault(place, other)
    return Election(builds=rank in lowest.values(), builders=tuple(lowest.values()))


def check_equal_copies(prefixes: list[str], election: Election) -> None:
    """Compare the .idx files and the sizes of the .bin files of all domains.  All ranks call this together.

    Raises:
        DataError: copies differ, or one is missing; names hosts and paths.
    """
    if len(election.builders) < 2:
        return
    own = [_fingerprint(prefix) for prefix in prefixes] if election.builds else []
    copies: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(copies, (socket.gethostname(), prefixes, own))
    for number in range(len(prefixes)):
        found: dict[str, list[str]] = {}
        for rank in election.builders:
            host, names, fingerprints = copies[rank]
            found.setdefault(fingerprints[number], []).append(f"{host}:{names[number]} (rank {rank})")
        if len(found) > 1:
            listed = "; ".join(f"{', '.join(places)}: {what}" for what, places in found.items())
            raise DataError(
                f"copies of a data set differ between hosts that share no storage: {listed}. Copy the .bin "
                "and .idx files of one host to the others."
            )


def _fingerprint(prefix: str) -> str:
    """Hash of the .idx file and size of the .bin file, or what is missing."""
    digest = hashlib.sha256()
    try:
        with open(f"{prefix}.idx", "rb") as file:
            while block := file.read(_READ_AT_ONCE):
                digest.update(block)
        size = os.path.getsize(f"{prefix}.bin")
    except OSError as error:
        return f"{os.path.basename(error.filename)}: {error.strerror}"
    return f".idx {digest.hexdigest()[:16]} with {size} bytes of .bin"
