"""Values that every version of Python and NumPy can unpickle, without importing anything for them.

How an object is pickled is its class's business, and changes between versions: the member of an enumeration
is a call of its class on most Pythons, and a call of ``getattr`` on Python 3.11.0 to 3.11.3, which no careful
reader carries out. What goes into a checkpoint is therefore tensors, arrays of numbers, built-in containers
and built-in values only.
"""

import argparse
import enum
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

_PLAIN_TYPES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
# What the built-in base makes of an instance of a subclass, which may have its own idea of a conversion.
_BASES: tuple[tuple[type, Callable[[Any], Any]], ...] = (
    (int, int.__int__),
    (float, float.__float__),
    (complex, lambda value: complex(value.real, value.imag)),
    (str, str.__str__),
    ((bytes, bytearray), lambda value: bytes(memoryview(value))),
)
_SEQUENCES: tuple[tuple[Any, type], ...] = (
    ((list, deque, range), list),
    (tuple, tuple),
    ((set, frozenset), set),
)


class NotPlainError(TypeError):
    """An object that has no plain form; the message names its class and where it lies."""


def to_plain(value: Any, keep: Callable[[Any], Any] | None = None, place: str = "") -> Any:
    """``value`` out of built-in types alone.

    Members of enumerations become their values, NumPy's scalars Python's, paths text, and subclasses of
    built-in types (named tuples, default dictionaries ...) those types.

    Args:
        value: any structure.
        keep: makes the copy of a tensor, or of a numeric array; without it they are not plain.
        place: where ``value`` lies in the whole, for the message.

    Raises:
        NotPlainError: there is an object of another class in it.
    """
    if type(value) in _PLAIN_TYPES:
        return value
    if isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc"):
        if keep is None:
            raise NotPlainError(f"{place or 'it'} is a {type(value).__name__}")
        return keep(value)
    if isinstance(value, enum.Enum):
        return to_plain(value.value, keep, place)
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return to_plain(value.item(), keep, place)
    if isinstance(value, os.PathLike):
        return to_plain(os.fspath(value), keep, place)
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**to_plain(vars(value), keep, place))
    if isinstance(value, Mapping):
        return _plain_mapping(value, keep, place)
    for kinds, plain_kind in _SEQUENCES:
        if isinstance(value, kinds):
            return plain_kind(to_plain(item, keep, f"{place}[{i}]") for i, item in enumerate(value))
    for kind, convert in _BASES:
        if isinstance(value, kind):
            return convert(value)
    raise NotPlainError(f"{place or 'it'} is a {type(value).__module__}.{type(value).__qualname__}")


def _plain_mapping(value: Mapping, keep: Callable[[Any], Any] | None, place: str) -> dict[Any, Any]:
    items = (
        (to_plain(key, None, f"a key of {place or 'it'}"), to_plain(item, keep, f"{place}[{key!r}]"))
        for key, item in value.items()
    )
    if not isinstance(value, OrderedDict):
        return dict(items)
    copy = OrderedDict(items)
    # torch keeps the versions of modules in an attribute
    copy.__dict__.update(to_plain(vars(value), keep, place))
    return copy
