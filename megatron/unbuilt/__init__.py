"""Names that scripts import from parts that have no code yet.

``megatron/unbuilt/table.py`` lists them by part. A module of the table that has no file is created when it is
imported (``megatron/__init__.py`` asks :func:`find_spec` after every other finder, so a file always wins); a
module that has a file offers its rows with one line, ``__getattr__ = unbuilt.names_of(__name__)``.

A placeholder (``placeholders.py``) can be imported, used in annotations, subclassed, caught and
tested with ``isinstance``; calling it or making an instance raises
:class:`~megatron.core.errors.NotBuiltYetError`.
"""

import functools
import importlib.machinery
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

from megatron.unbuilt.placeholders import make
from megatron.unbuilt.table import FEATURES, Feature


@functools.cache
def rows() -> dict[str, dict[str, Feature]]:
    """The whole table: module -> name -> the part it belongs to."""
    found: dict[str, dict[str, Feature]] = {}
    for feature in FEATURES:
        for module, names in feature.modules.items():
            found.setdefault(module, {}).update(dict.fromkeys(names, feature))
    return found


@functools.cache
def _packages() -> frozenset[str]:
    """Modules above those of the table."""
    parts = [module.split(".") for module in rows()]
    return frozenset(".".join(each[:count]) for each in parts for count in range(2, len(each)))


def find_spec(fullname: str) -> importlib.machinery.ModuleSpec | None:
    """Spec of a module of the table, or of a package above one; None for any other name."""
    if fullname not in rows() and fullname not in _packages():
        return None
    return importlib.machinery.ModuleSpec(
        fullname, cast(Any, _Loader), origin="not built yet", is_package=True
    )


def names_of(module: str) -> Callable[[str], Any]:
    """``__getattr__`` for a module with a file: the names that the table lists for it."""

    def __getattr__(name: str) -> Any:
        feature = rows().get(module, {}).get(name)
        if feature is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return make(name, feature)

    return __getattr__


class _Loader:
    """Creates a module that has no file."""

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        module.__doc__ = "Not built yet."
        for name, feature in rows().get(module.__name__, {}).items():
            setattr(module, name, make(name, feature))
