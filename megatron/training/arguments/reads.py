"""Which arguments and config fields code has read, recorded while it runs.

Copying is no use: a namespace that is printed, saved, pickled or copied into a config has not been read, nor
has a config that is copied, compared, printed or checked by its own rules.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

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

    def _watch(self, config_class: type) -> None:
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
