"""Placeholders for classes, functions and values that have no code yet."""

import abc
import enum
import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any, NoReturn

from megatron.core.errors import NotBuiltYetError
from megatron.unbuilt.table import FEATURES, Feature
from megatron.unbuilt.values import VALUES, Alias, ConstantFunction, Enumeration, ExceptionClass


class NotBuiltYetAttributeError(NotBuiltYetError, AttributeError):
    """An attribute of something that is not built yet; ``hasattr`` finds it missing."""


@functools.cache
def make(name: str, feature: Feature) -> Any:
    """The object that importing ``name`` gives, the same one under all paths that a part lists it for.

    A row of ``VALUES`` decides. Without one, a name that begins with a capital letter is a class and any
    other a function.
    """
    module = next(path for path, names in feature.modules.items() if name in names)
    if name == "logger":
        return logging.getLogger(module)
    value = VALUES.get(f"{module}:{name}", feature)
    if isinstance(value, ExceptionClass):
        base = make(value.base, feature) if value.base else Exception
        return type(name, (base,), {"__module__": module, "__doc__": "Raised by nothing here yet."})
    if isinstance(value, Enumeration):
        return enum.Enum(name, value.members, module=module)
    if isinstance(value, Alias):
        path, _, attribute = value.target.partition(":")
        return getattr(importlib.import_module(path), attribute)
    if isinstance(value, ConstantFunction):
        return _named(lambda *args, **kwargs: value.result, module, name)
    if value is not feature:
        return value
    if name.lstrip("_")[0].isupper():
        return _Unbuilt(name, (), {"__module__": module, "__doc__": "Not built yet.", "_unbuilt": feature})
    return _named(lambda *args, **kwargs: _refuse(f"{module}.{name}", feature), module, name)


def _refuse(asked: str, feature: Feature, error: type[NotBuiltYetError] = NotBuiltYetError) -> NoReturn:
    raise error(f"{asked} ({feature.what})", remedy=feature.instead)


def _named(function: Callable, module: str, name: str) -> Callable:
    function.__module__, function.__name__, function.__qualname__ = module, name, name
    return function


class WithoutShardedState:
    """Base of modules whose part of a distributed checkpoint is not built."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict[str, Any] | None = None
    ) -> NoReturn:
        """Not built yet."""
        feature = next(each for each in FEATURES if "megatron.core.dist_checkpointing" in each.modules)
        _refuse(f"{type(self).__name__}.sharded_state_dict", feature)


class _Unbuilt(abc.ABCMeta):
    """Type of placeholder classes and of classes that users derive from them: no instances, no attributes.

    Derived from ABCMeta, so that a class may have a placeholder and an abstract class as its bases.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(cls._unbuilt_name(), cls._unbuilt)

    def __getattr__(cls, name: str) -> NoReturn:
        _refuse(f"{cls._unbuilt_name()}.{name}", cls._unbuilt, NotBuiltYetAttributeError)

    def __getitem__(cls, key: Any) -> NoReturn:
        _refuse(cls._unbuilt_name(), cls._unbuilt)

    __iter__ = __contains__ = __getitem__

    def _unbuilt_name(cls) -> str:
        """Dotted name of the placeholder that this class is, or is derived from."""
        placeholder = next(each for each in cls.__mro__ if "_unbuilt" in vars(each))
        return f"{placeholder.__module__}.{placeholder.__qualname__}"
