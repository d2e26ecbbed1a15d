"""Making process groups: each member list once, and only by its members."""

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from megatron.core import accelerator
from megatron.core.errors import ConfigError

# World -> numbers of the factories made in it. Every rank makes the same factories in the same order.
_FACTORIES: "weakref.WeakKeyDictionary[ProcessGroup, count]" = weakref.WeakKeyDictionary()


def backends(group: ProcessGroup | None = None) -> dict[str, str]:
    """Name of the backend by the kind of device whose tensors it carries in a group (None: the world)."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))


def device_backend(group: ProcessGroup | None = None) -> str | None:
    """Name of the backend that carries this device's tensors in a group; None where it is not told apart."""
    return backends(group).get(accelerator.device_type())


def message_device(group: ProcessGroup | None = None) -> torch.device:
    """Where a few numbers that the host has, and wants back at once, should lie to travel in a group.

    In host memory where the group carries it: they then wait for no work that is queued on the device, and
    the group needs no buffers there. Otherwise on the device.
    """
    return torch.device("cpu") if "cpu" in backends(group) else accelerator.current_device()


def communicator_options(labels: Iterable[str], buffers_mb: Mapping[str, int]) -> Any:
    """Options of a group that the device's package chooses by what the group is for; None for defaults.

    Args:
        labels: names of what shares the group, as in ``parallel_state.groups.GROUP_AXES``; "world".
        buffers_mb: sizes of communication buffers that were asked for, by such names.
    """
    choose = accelerator.companion("communicator_options")
    return None if choose is None else choose(tuple(labels), buffers_mb)


class _Key(NamedTuple):
    """What tells groups of one factory apart."""

    ranks: tuple[int, ...]
    in_layers: bool

    @classmethod
    def of(cls, ranks: list[int], in_layers: bool) -> "_Key":
        return cls(tuple(ranks), in_layers and len(ranks) > 1)


class GroupFactory:
    """Makes process groups of this rank, one per distinct list of members.

    Groups whose messages layers wait for share none with the others: a device keeps the order of a group's
    messages.

    Members find each other under a name that follows from the members and the factory alone. Torch's own
    names for groups made by their members also count the groups that a rank has made before, and that
    number differs between ranks as soon as a group exists only for some (the embedding group of the outer
    pipeline stages): its members would wait for each other under different names.

    All ranks of the world make their factories in the same order.

    Args:
        timeout: of the collectives; None for the backend's default.
        backend: None for the one that carries the device's tensors in the world.
        nccl_settings: see ``get_nccl_options``.
        options: of the backend, for every group.
        buffers_mb: see ``communicator_options``.
    """

    def __init__(
        self,
        timeout: timedelta | None,
        backend: str | None = None,
        nccl_settings: dict | None = None,
        options: Any = None,
        buffers_mb: Mapping[str, int] | None = None,
    ):
        self._timeout, self._backend = timeout, backend or device_backend()
        self._settings, self._options = nccl_settings or {}, options
        self._buffers_mb = buffers_mb or {}
        world = dist.group.WORLD
        assert world is not None, "torch.distributed has been initialized"
        self._number = next(_FACTORIES.setdefault(world, count()))
        self._labels: dict[_Key, list[str]] = {}
        self._made: dict[_Key, ProcessGroup] = {}

    @property
    def made(self) -> int:
        """Number of groups made so far."""
        return len(self._made)

    @property
    def labelled(self) -> list[tuple[tuple[str, ...], int]]:
        """Labels and number of members of the groups made so far."""
        return [(tuple(self._labels.get(key, ())), len(key.ranks)) for key in self._made]

    def expect(self, ranks: list[int], label: str, in_layers: bool = False) -> None:
        """Announces what a group is for, before it is made: everything that shares it has a say in how."""
        self._labels.setdefault(_Key.of(ranks, in_layers), []).append(label)

    def make(self, ranks: list[int], label: str | None = None, in_layers: bool = False) -> ProcessGroup:
        """The group of ``ranks``, which must hold the calling rank.

        Args:
            ranks: global ranks.
            label: shown in debug output; what the group is for, if nothing was announced.
            in_layers: layers wait for its messages.
        """
        key = _Key.of(ranks, in_layers)
        if key not in self._made:
            if label is not None and key not in self._labels:
                self.expect(ranks, label, in_layers)
            options = self._options_of(self._labels.get(key, []))
            with self._own_names(key):
                self._made[key] = create_group(
                    ranks,
                    timeout=self._timeout,
                    backend=self._backend,
                    pg_options=options,
                    use_local_synchronization=True,
                    group_desc=label,
                )
        return self._made[key]

    def _options_of(self, labels: list[str]) -> Any:
        """The caller's for every group, else those in a file, else those of the device's package."""
        named = [label for label in labels if label in self._settings]
        if self._options is not None or not labels:
            return self._options
        if named:
            return get_nccl_options(named[0], self._settings)
        if self._backend != accelerator.collective_backend():
            return None
        return communicator_options(labels, self._buffers_mb)

    @contextmanager
    def _own_names(self, key: "_Key") -> Iterator[None]:
        """Torch has no argument for the name, so the function that chooses it is replaced for a moment."""

        def name(ranks: list[int], use_hashed_name: bool) -> str:
            members = hashlib.sha1("_".join(map(str, ranks)).encode(), usedforsecurity=False).hexdigest()
            return f"members_{self._number}_{members}{'_in_layers' if key.in_layers else ''}"

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
    group = dist.new_group(
        ranks,
        timeout=timeout,
        backend=backend,
        pg_options=pg_options,
        use_local_synchronization=use_local_synchronization,
        group_desc=group_desc,
    )
    return cast(ProcessGroup, group)  # or the mark of torch's for a rank that is no member


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
    config: Any = options.config
    config.cga_cluster_size = entry.get("cga_cluster_size", 4)
    config.max_ctas = entry.get("max_ctas", 32)
    config.min_ctas = entry.get("min_ctas", 1)
    if "net_name" in entry:
        config.net_name = entry["net_name"]
    return options
