"""Recipes for modules: which class, with which parameters and parts."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from megatron.core.errors import UsageError


@dataclass
class ModuleSpec:
    """How to build a module.

    Attributes:
        module: a class, a function, or ``("import.path", "Name")``.
        params: extra keyword arguments of the constructor.
        submodules: dataclass of the parts' specs, passed as ``submodules=``.
    """

    module: tuple[str, str] | type
    params: dict[str, Any] = field(default_factory=dict)
    submodules: Any = None


def import_module(module_path: tuple[str, ...]) -> Any:
    """The object named by ``("import.path", "Name")``.

    Raises:
        ImportError: no such module, or no such name in it.
    """
    path, name = module_path
    module = importlib.import_module(path)
    if not hasattr(module, name):
        raise ImportError(f"module {path!r} has no {name!r}")
    return getattr(module, name)


def get_module(
    spec_or_module: ModuleSpec | type | Callable[..., Any] | None, **additional_kwargs: Any
) -> Any:
    """The class or function behind a spec.

    Raises:
        UsageError: None, a slot that was left empty, or what is neither a spec nor a class nor a function.
    """
    if isinstance(spec_or_module, type | FunctionType):
        return spec_or_module
    if not isinstance(spec_or_module, ModuleSpec):
        raise UsageError(
            f"a slot of a layer spec holds {spec_or_module!r}: put a ModuleSpec, a class or a function there"
        )
    module = spec_or_module.module
    return module if isinstance(module, type | FunctionType) else import_module(module)


def build_module(
    spec_or_module: ModuleSpec | type | Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """An instance of the class behind a spec; a plain function is returned as it is.

    Keyword arguments given here win over nothing: they and the spec's ``params`` must not overlap. An
    exception of the constructor is raised again with the name of the class, so that a deep spec says which
    slot failed.
    """
    module = get_module(spec_or_module)
    if isinstance(module, FunctionType):
        return module
    spec = spec_or_module if isinstance(spec_or_module, ModuleSpec) else ModuleSpec(module)
    parts = {} if spec.submodules is None else {"submodules": spec.submodules}
    try:
        return module(*args, **spec.params, **parts, **kwargs)
    except Exception as error:
        error.args = (f"{error} when instantiating {module.__name__}", *error.args[1:])
        raise
