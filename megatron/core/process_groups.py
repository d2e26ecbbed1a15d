"""Making process groups: each member list once, and only by its members."""

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup


class GroupFactory:
    """Makes process groups of this rank, one per distinct list of members."""

    def __init__(self, timeout: timedelta, backend: str | None = None):
        self._timeout = timeout
        self._backend = backend
        self._made: dict[tuple[int, ...], ProcessGroup] = {}

    def make(self, ranks: list[int]) -> ProcessGroup:
        """The group of ``ranks``, which must hold the calling rank."""
        key = tuple(ranks)
        if key not in self._made:
            self._made[key] = dist.new_group(
                ranks, timeout=self._timeout, backend=self._backend, use_local_synchronization=True
            )
        return self._made[key]
