"""Names the flags that were given, but that nothing has read: they have no effect in this run.

Reads of arguments and config fields are recorded while a run is set up. A flag acts if a value that it
changes has been read by then: its own argument, one that was derived from it, or a config field made from
either. The rows of the flags say which are read later. Flags of the user's own script may be read at any
time, so their record goes on until the end of the run.

Copying does not count: a namespace that is printed, saved, pickled or copied into a config has not been
read, nor has a config that is copied, compared, printed or checked by its own rules.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.training import agreement, global_vars
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.arguments.checks import warnings_about
from megatron.training.arguments.flag import Flag
from megatron.training.arguments.flags import READ_LATER, flags_by_name
from megatron.training.arguments.validation import completed
from megatron.training.model_setup import ddp_config_from_args, optimizer_config_from_args
from megatron.training.utils import print_rank_0

CONFIG_CLASSES = (ModelParallelConfig, OptimizerConfig, DistributedDataParallelConfig)
CONFIG_MAKERS = (core_transformer_config_from_args, ddp_config_from_args, optimizer_config_from_args)

# Functions that touch every field of a config without using any.
_COPYING = frozenset(
    {"__repr__", "__eq__", "_replace", "replace", "_asdict_inner", "default", "field_values"}
)


class Reads:
    """Records the names that are read from one namespace of arguments, and from all configs of some classes.

    The namespace is of a class of its own meanwhile and of the plain one afterwards, as the config classes
    are; then a read costs what it did before.

    Args:
        config_classes: classes whose instances, and those of their subclasses, are watched.

    Attributes:
        arguments: names of arguments read so far.
        fields: names of config fields read so far.
        handed_out: code outside this package took the arguments as a mapping: any may have been read.
    """

    def __init__(self, config_classes: Iterable[type] = ()):
        self.arguments: set[str] = set()
        self.fields: set[str] = set()
        self.handed_out = False
        self._config_classes = tuple(config_classes)
        self._args: Namespace | None = None
        self._plain_class: type = Namespace
        self._configs_are_watched = False
        self._checking = 0

    def begin(self, args: Namespace) -> None:
        """Record reads of ``args``, and of configs, from now on."""
        self._args, self._plain_class = args, type(args)
        args.__class__ = _watched_namespace(self, type(args))
        for config_class in self._config_classes:
            self._watch(config_class)
        self._configs_are_watched = True

    def end_configs(self) -> None:
        """Record no more reads of configs."""
        if not self._configs_are_watched:
            return
        self._configs_are_watched = False
        for config_class in self._config_classes:
            del config_class.__getattribute__
            if "_unwatched_post_init" in vars(config_class):
                config_class.__post_init__ = config_class._unwatched_post_init
                del config_class._unwatched_post_init

    def end(self) -> None:
        """Record nothing any more."""
        self.end_configs()
        if self._args is not None:
            self._args.__class__ = self._plain_class
            self._args = None

    def _watch(self, config_class: Any) -> None:
        def read(config: Any, name: str) -> Any:
            if not self._checking and sys._getframe(1).f_code.co_name not in _COPYING:
                self.fields.add(name)
            return object.__getattribute__(config, name)

        config_class.__getattribute__ = read
        own_rules = vars(config_class).get("__post_init__")
        if own_rules is None:
            return

        def check(config: Any) -> None:
            self._checking += 1
            try:
                own_rules(config)
            finally:
                self._checking -= 1

        config_class._unwatched_post_init = own_rules
        config_class.__post_init__ = check


def _watched_namespace(reads: Reads, plain: type[Namespace]) -> type[Namespace]:
    """A class that reports to ``reads``; its copies report too, its pickles are of the ``plain`` class."""

    class WatchedNamespace(plain):
        def __getattribute__(self, name: str) -> Any:
            if name == "__dict__":
                caller = sys._getframe(1).f_globals.get("__name__", "")
                if caller.partition(".")[0] not in ("megatron", "argparse"):
                    reads.handed_out = True
            else:
                reads.arguments.add(name)
            return object.__getattribute__(self, name)

        def __copy__(self) -> Namespace:
            return _like(self, dict(object.__getattribute__(self, "__dict__")))

        def __deepcopy__(self, memo: dict[int, Any]) -> Namespace:
            return _like(self, copy.deepcopy(object.__getattribute__(self, "__dict__"), memo))

        def __reduce_ex__(self, protocol: Any) -> tuple:
            return plain, (), dict(object.__getattribute__(self, "__dict__"))

    return WatchedNamespace


def _like(args: Namespace, values: dict[str, Any]) -> Namespace:
    twin = type(args)()
    for name, value in values.items():
        setattr(twin, name, value)
    return twin


class UnreadFlags:
    """What was given on the command line, and what has been read of it.

    Args:
        reads: the record, which begins here.
        asked: the arguments before they were completed.
        args: the arguments of the run.
        defaults: of the entry point, for arguments that are None.

    Attributes:
        given: every flag of the command line, as it was spelled.
    """

    def __init__(self, reads: Reads, asked: Namespace, args: Namespace, defaults: Mapping[str, Any]):
        self.reads = reads
        self._asked, self._defaults = asked, defaults
        self.given: tuple[str, ...] = tuple(getattr(asked, "given_flags", None) or ())
        told = warnings_about(args, self.given)
        self._flags = {
            name: flag
            for name, flag in flags_by_name().items()
            if name in self.given
            and flag.is_plain
            and name not in told
            and getattr(asked, flag.dest) != flag.default
        }
        self._own: dict[str, str] = dict(getattr(asked, "own_flags", {}))
        reads.begin(args)

    def of_setup(self) -> list[str]:
        """The flags of this project that nothing has read on this rank."""
        return [name for name, flag in self._flags.items() if not self._is_read(flag)]

    def of_script(self) -> list[str]:
        """The flags of the user's own script that nothing has read on this rank."""
        if self.reads.handed_out:
            return []
        return [name for name, dest in self._own.items() if dest not in self.reads.arguments]

    def _is_read(self, flag: Flag) -> bool:
        names = self.reads.arguments | self.reads.fields | READ_LATER
        return flag.dest in names or self.reads.handed_out or bool(names & self.changed_by(flag.name))

    def changed_by(self, name: str) -> set[str]:
        """Names of the arguments and config fields that would differ without the flag ``name``."""
        flag = flags_by_name()[name]
        without = copy.copy(self._asked)
        setattr(without, flag.dest, flag.default)
        without.given_flags = tuple(name for name in without.given_flags if name not in flag.names)
        one, other = (completed(copy.copy(asked), self._defaults) for asked in (self._asked, without))
        changed = _differences(vars(one), vars(other))
        for make in CONFIG_MAKERS:
            try:
                changed |= _differences(vars(make(one)), vars(make(other)))
            except Exception:  # there is no such model without the flag
                return self.reads.arguments
        return changed


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> set[str]:
    missing = object()
    return {name for name in one.keys() | other.keys() if one.get(name, missing) != other.get(name, missing)}


def record_reads(defaults: Mapping[str, Any], asked: Namespace, args: Namespace) -> None:
    """Begin the record of this run; see :class:`UnreadFlags`."""
    global_vars.set_unread_flags(UnreadFlags(Reads(CONFIG_CLASSES), asked, args, defaults))


def name_flags_unread_in_setup() -> None:
    """At the end of set-up: a line for every flag of this project that no rank has read."""
    unread = global_vars.get_unread_flags()
    if unread is None:
        return
    unread.reads.end_configs()
    for name in on_all_ranks(unread.of_setup()):
        print_rank_0(f"WARNING: {name} was given, but nothing has read it: it has no effect in this run")
    if not on_all_ranks(unread.of_script()):
        unread.reads.end()


def name_flags_unread_by_script() -> None:
    """At the end of the run: a line for every flag of the user's own script that no rank has read."""
    unread = global_vars.get_unread_flags()
    if unread is None:
        return
    for name in on_all_ranks(unread.of_script()):
        print_rank_0(f"WARNING: {name} was given, but nothing in this run has read it")
    unread.reads.end()


def on_all_ranks(names: Sequence[str]) -> list[str]:
    """Those of this rank's names that every rank has."""
    if agreement.world_size() == 1:
        return list(names)
    everybody: list[Any] = [None] * agreement.world_size()
    torch.distributed.all_gather_object(everybody, list(names))
    return [name for name in names if all(name in others for others in everybody)]
