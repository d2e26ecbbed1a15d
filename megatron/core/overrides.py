"""Replaceable functions: declared where the default lives, replaced where a device's kernel lives.

    # megatron/core/fusions/fused_layer_norm.py
    @overridable
    def rms_norm(x, weight, eps): ...

    # megatron_npu/core/fusions/fused_layer_norm.py
    @override("megatron.core.fusions.fused_layer_norm.rms_norm")
    def npu_rms_norm(x, weight, eps): ...

Registration checks that both signatures agree and refuses a second replacement of one point. ``load``
imports the package of replacements for a device; ``disable`` puts defaults back by name, for bisecting a
loss difference.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from megatron.core.errors import MegatronError

P = ParamSpec("P")
R = TypeVar("R")

DISABLE_VARIABLE = "MEGATRON_DISABLE_OVERRIDES"
# Packages whose modules declare the replaceable functions of the library.
_POINT_PACKAGES = ("megatron.core.fusions", "megatron.core.optimizer")


class OverrideError(MegatronError):
    """A replacement that cannot be registered, or a name that is no replaceable function."""


class _Point:
    """One replaceable function: its default, and what stands in for it."""

    def __init__(self, path: str, default: Callable[..., Any], install: Callable[[Callable[..., Any]], None]):
        self.path = path
        self.default = default
        self.replacement: Callable[..., Any] | None = None
        self._install = install

    def refresh(self) -> None:
        """Routes calls to the replacement, or to the default when there is none or it is switched off."""
        replacement = None if _is_disabled(self.path) else self.replacement
        self._install(self.default if replacement is None else replacement)


@dataclass(frozen=True)
class PointStatus:
    """A row of :func:`table`."""

    path: str
    default: Callable[..., Any]
    replacement: str | None
    active: bool
    reason: str


_points: dict[str, _Point] = {}
_disabled: set[str] = set()


def overridable(default: Callable[P, R]) -> Callable[P, R]:
    """Marks a module-level function as replaceable; its dotted path is the name of the point.

    Calls go through one closure cell (some 50 ns), so the point can sit on a hot path.
    """
    active: Callable[..., Any] = default

    @functools.wraps(default)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the device's replacement of a function, or its default where there is none."""
        return active(*args, **kwargs)

    def install(function: Callable[..., Any]) -> None:
        nonlocal active
        active = function

    path = f"{default.__module__}.{default.__qualname__}"
    _points[path] = _Point(path, default, install)
    return dispatch


def override(path: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Replaces the function at ``path`` by the decorated one, which must have the same signature.

    Raises:
        OverrideError: no such point, another signature, or a second replacement.
    """

    def register(replacement: Callable[P, R]) -> Callable[P, R]:
        point = _find(path)
        check_signature(path, replacement)
        if point.replacement is not None and _name(point.replacement) != _name(replacement):
            raise OverrideError(
                f"{path} is already replaced by {_name(point.replacement)}; "
                f"{_name(replacement)} cannot replace it as well: remove one of the two"
            )
        point.replacement = replacement
        point.refresh()
        return replacement

    return register


def check_signature(path: str, replacement: Callable[..., Any]) -> None:
    """Parameters must agree with the point's in name, order, kind and default; annotations may differ.

    Raises:
        OverrideError: they do not, or there is no such point.
    """
    default = _find(path).default
    if _parameters(default) != _parameters(replacement):
        raise OverrideError(
            f"{_name(replacement)}{inspect.signature(replacement)} cannot replace {path}"
            f"{inspect.signature(default)}: give it the same parameters, kinds and defaults"
        )


def load(device_type: str) -> bool:
    """Activates the package of replacements ``megatron_<device_type>``; False when there is none installed.

    The package registers its replacements on import, or in a function ``activate()`` of its own.
    """
    package = f"megatron_{device_type}"
    if importlib.util.find_spec(package) is None:
        return False
    activate = getattr(importlib.import_module(package), "activate", None)
    if activate is not None:
        activate()
    return True


def default_of(path: str) -> Callable[..., Any]:
    """The function that ``path`` was marked with, replaced or not.

    Raises:
        OverrideError: no such point.
    """
    return _find(path).default


def is_replaced(point: Callable[..., Any]) -> bool:
    """Whether calls of ``point``, a function marked with :func:`overridable`, go to a replacement."""
    return _status(_find(f"{point.__module__}.{point.__qualname__}")).active


def disable(names: str | Iterable[str]) -> None:
    """Puts the defaults back for the named points, now and for replacements registered later.

    Args:
        names: dotted paths or their last parts (``rms_norm``), or ``all``; a string may hold several,
            separated by commas.

    Raises:
        OverrideError: a name that fits no replaceable function.
    """
    parts = names.split(",") if isinstance(names, str) else list(names)
    wanted = {part.strip() for part in parts if part.strip()}
    for name in wanted - {"all"}:
        _check_known(name)
    _disabled.update(wanted)
    for point in _points.values():
        point.refresh()


def enable_all() -> None:
    """Takes back every :func:`disable` of this process (not the environment variable)."""
    _disabled.clear()
    for point in _points.values():
        point.refresh()


def table() -> list[PointStatus]:
    """Every replaceable function known so far, sorted by path, with what is active and why."""
    return [_status(point) for _, point in sorted(_points.items())]


def import_all_points() -> None:
    """Imports the modules that declare replaceable functions, so that :func:`table` is complete."""
    for package_name in _POINT_PACKAGES:
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__, f"{package_name}."):
            importlib.import_module(module.name)


def _status(point: _Point) -> PointStatus:
    if point.replacement is None:
        return PointStatus(point.path, point.default, None, False, "no replacement registered")
    if _is_disabled(point.path):
        return PointStatus(point.path, point.default, _name(point.replacement), False, "disabled by name")
    return PointStatus(point.path, point.default, _name(point.replacement), True, "active")


def _is_disabled(path: str) -> bool:
    from_environment = {part.strip() for part in os.environ.get(DISABLE_VARIABLE, "").split(",")}
    return any(name == "all" or _fits(name, path) for name in _disabled | from_environment if name)


def _fits(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _find(path: str) -> _Point:
    if path not in _points:
        module, _, _ = path.rpartition(".")
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise OverrideError(f"override of {path}: cannot import {module!r}: {error}") from error
    if path not in _points:
        raise OverrideError(f"override of {path}: no function is marked @overridable there{_suggest(path)}")
    return _points[path]


def problem_with_name(name: str) -> str | None:
    """What is wrong with a name for :func:`disable`; None if nothing is."""
    if name == "all" or any(_fits(name, path) for path in _points):
        return None
    import_all_points()
    if any(_fits(name, path) for path in _points):
        return None
    return f"no replaceable function has that name{_suggest(name)}"


def _check_known(name: str) -> None:
    problem = problem_with_name(name)
    if problem:
        raise OverrideError(f"disable override {name!r}: {problem}")


def _suggest(name: str) -> str:
    short_names = {path.rpartition(".")[2]: path for path in _points}
    close = difflib.get_close_matches(name.rpartition(".")[2], short_names, n=1, cutoff=0.5)
    return f"; did you mean {short_names[close[0]]!r}?" if close else ""


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
