"""Versions of torch and of the optional kernel libraries, comparable even where a library is absent."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from packaging.version import Version

# Stands for "not installed": smaller than any release, so every minimum-version test fails.
_ABSENT = "0.0.0"


def _installed_version(*distributions: str) -> Version:
    from packaging.version import Version

    for distribution in distributions:
        try:
            return Version(importlib.metadata.version(distribution))
        except importlib.metadata.PackageNotFoundError:
            continue
    return Version(_ABSENT)


def get_torch_version() -> Version:
    """Version of torch."""
    from packaging.version import Version

    return Version(torch.__version__)


def get_te_version() -> Version:
    """Version of TransformerEngine; 0.0.0 when it is not installed."""
    return _installed_version("transformer-engine", "transformer_engine")


def get_fa_version() -> Version:
    """Version of flash-attn; 0.0.0 when it is not installed."""
    return _installed_version("flash-attn", "flash_attn")


def _at_least(found: Version, version: str, check_equality: bool) -> bool:
    from packaging.version import Version

    return found >= Version(version) if check_equality else found > Version(version)


def is_torch_min_version(version: str, check_equality: bool = True) -> bool:
    """True if torch is at least ``version`` (newer than it without ``check_equality``)."""
    return _at_least(get_torch_version(), version, check_equality)


def is_te_min_version(version: str, check_equality: bool = True) -> bool:
    """The same for TransformerEngine; False where it is absent."""
    from megatron.core import utils  # tests replace utils.get_te_version

    return _at_least(utils.get_te_version(), version, check_equality)


def is_fa_min_version(version: str, check_equality: bool = True) -> bool:
    """The same for flash-attn; False where it is absent."""
    return _at_least(get_fa_version(), version, check_equality)
