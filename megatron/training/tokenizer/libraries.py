"""The tokenizer libraries, imported only when a tokenizer that needs one is built."""

import importlib
import os
from types import ModuleType

from megatron.core.errors import ConfigError


def need(module: str, asked_by: str, package: str | None = None) -> ModuleType:
    """Import ``module``, or say which ``package`` to install for ``asked_by``.

    Raises:
        ConfigError: the package is not installed, or does not import here.
    """
    package = package or module.split(".")[0]
    # One thread in each process: preprocessing and data loading start one process per core themselves, and a
    # thread pool does not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{asked_by} needs the Python package {package!r}, which does not import here ({error}); "
            f"install it: pip install {package}"
        ) from error
