"""Marks for functions and classes that are off unless ``megatron.core.config.ENABLE_EXPERIMENTAL`` is set."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from megatron.core import config
from megatron.core.errors import MegatronError

T = TypeVar("T")


class ExperimentalNotEnabledError(MegatronError):
    """Experimental code was called while the switch is off."""


def _require_enabled(name: str, version: str) -> None:
    if not config.ENABLE_EXPERIMENTAL:
        raise ExperimentalNotEnabledError(
            f"{name} is experimental since {version}; set megatron.core.config.ENABLE_EXPERIMENTAL = "
            "True to use it"
        )


def experimental_fn(introduced_with_version: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Decorator of a function that must not run while the switch is off."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> T:
            _require_enabled(function.__name__, introduced_with_version)
            return function(*args, **kwargs)

        return checked

    return decorate


def experimental_cls(introduced_with_version: str) -> Callable[[type[T]], type[T]]:
    """Decorator of a class that must not be constructed while the switch is off."""

    def decorate(cls: type[T]) -> type[T]:
        construct = cls.__init__

        @functools.wraps(construct)
        def checked(self: T, *args: Any, **kwargs: Any) -> None:
            _require_enabled(cls.__name__, introduced_with_version)
            construct(self, *args, **kwargs)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate
