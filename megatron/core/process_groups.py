"""Making process groups: each member list once, and only by its members."""

import hashlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from megatron.core.errors import ConfigError

# World -> numbers of the factories made in it. Every rank makes the same factories in the same order.
_FACTORIES: "weakref.WeakKeyDictionary[ProcessGroup, count]" = weakref.WeakKeyDictionary()


class GroupFactory:
    """Makes process groups of this rank, one per distinct list of members.

    Members find each other under a name that follows from the members and the factory alone. Torch's own
    names for groups made by their members also count the groups that a rank has made before, and that
    number differs between ranks as soon as a group exists only for some (the embedding group of the outer
    pipeline stages): its members would wait for each other under different names.

    All ranks of the world make their factories in the same order.

    Args:
        timeout: of the collectives; None for the backend's default.
        backend: None for the world's own.
        nccl_settings: see ``get_nccl_options``.
        options: of the backend, for every group.
    """

    def __init__(
        self,
        timeout: timedelta | None,
        backend: str | None = None,
        nccl_settings: dict | None = None,
        options: Any = None,
    ):
        self._timeout, self._backend = timeout, backend
        self._settings, self._options = nccl_settings, options
        self._number = next(_FACTORIES.setdefault(dist.group.WORLD, count()))
        self._made: dict[tuple[int, ...], ProcessGroup] = {}

    @property
    def made(self) -> int:
        """Number of groups made so far."""
        return len(self._made)

    def make(self, ranks: list[int], label: str | None = None) -> ProcessGroup:
        """The group of ``ranks``, which must hold the calling rank; ``label`` finds its NCCL settings."""
        key = tuple(ranks)
        if key not in self._made:
            options = self._options
            if self._settings is not None and label is not None:
                options = get_nccl_options(label, self._settings)
            with self._own_names():
                self._made[key] = create_group(
                    ranks,
                    timeout=self._timeout,
                    backend=self._backend,
                    pg_options=options,
                    use_local_synchronization=True,
                    group_desc=label,
                )
        return self._made[key]

    @contextmanager
    def _own_names(self) -> Iterator[None]:
        """Torch has no argument for the name, so the function that chooses it is replaced for a moment."""

        def name(ranks: list[int], use_hashed_name: bool) -> str:
            members = hashlib.sha1("_".join(map(str, ranks)).encode(), usedforsecurity=False).hexdigest()
            return f"members_{self._number}_{members}"

        original = distributed_c10d._process_group_name
        distributed_c10d._process_group_name = name
        try:
            yield
        finally:
            distributed_c10d._process_group_name = original


def create_group(
    ranks: list[int] | None = None,
    timeout: timedelta | None = None,
    backend: str | None = None,
    pg_options: Any = None,
    use_local_synchronization: bool = False,
    group_desc: str | None = None,
) -> ProcessGroup:
    """``torch.distributed.new_group``, with ``group_desc`` as the name that debug output shows."""
    return dist.new_group(
        ranks,
        timeout=timeout,
        backend=backend,
        pg_options=pg_options,
        use_local_synchronization=use_local_synchronization,
        group_desc=group_desc,
    )


def load_nccl_settings(path: str) -> dict[str, dict[str, Any]]:
    """NCCL settings by group from a YAML file.

    Raises:
        ConfigError: the file cannot be read, or does not map names of groups to settings.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"NCCL settings {path} cannot be read: {error}") from None
    if not isinstance(settings, dict) or not all(isinstance(entry, dict) for entry in settings.values()):
        raise ConfigError(f"NCCL settings {path}: give names of groups with settings below each")
    return settings


def get_nccl_options(pg_name: str, nccl_comm_cfgs: dict[str, dict[str, Any]]) -> Any:
    """Options of the group ``pg_name`` from settings by group; None where it has none.

    The keys are cga_cluster_size (default 4), max_ctas (32), min_ctas (1) and net_name.

    Raises:
        ConfigError: this build of torch has no NCCL.
    """
    if pg_name not in nccl_comm_cfgs:
        return None
    if not dist.is_nccl_available():
        raise ConfigError(f"this build of torch {torch.__version__} has no NCCL, so no options for {pg_name}")
    entry = nccl_comm_cfgs[pg_name]
    options = dist.ProcessGroupNCCL.Options()
    options.config.cga_cluster_size = entry.get("cga_cluster_size", 4)
    options.config.max_ctas = entry.get("max_ctas", 32)
    options.config.min_ctas = entry.get("min_ctas", 1)
    if "net_name" in entry:
        options.config.net_name = entry["net_name"]
    return options
