"""Built indices on disk, so that later starts and other ranks load them instead of building.

A cache entry is ``{hash}-{Class}-{split}-description.txt``, whose text has the MD5 ``hash``, and one
``.npy`` per array. The description is written last and every file appears under its name only when
complete, so that an interrupted writer leaves no entry, or a whole one.
"""

import logging
import os
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from megatron.core.datasets.utils import os_error_text, temporary_beside
from megatron.core.errors import DataError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

_DESCRIPTION = "description.txt"


class IndexCache:
    """One cache entry.

    Args:
        directory: where the files lie; made when something is stored.
        stem: ``{hash}-{Class}-{split}``.
        description: the text the hash is of.
        names: of the arrays.
    """

    def __init__(self, directory: str, stem: str, description: str, names: tuple[str, ...]) -> None:
        self.directory = directory
        self.stem = stem
        self.description = description
        self.names = names

    def path(self, affix: str) -> str:
        """Path of one file of the entry."""
        return os.path.join(self.directory, f"{self.stem}-{affix}")

    def load(self, find_fault: Callable[..., str | None]) -> list[np.ndarray] | None:
        """The arrays as read-only memory maps, or None when the entry is absent or unusable.

        Args:
            find_fault: called with the arrays; says what is wrong with them, or None.
        """
        paths = [self.path(f"{name}.npy") for name in self.names]
        if not all(map(os.path.isfile, [self.path(_DESCRIPTION), *paths])):
            return None
        try:
            arrays = [np.load(path, mmap_mode="r", allow_pickle=False) for path in paths]
        except (ValueError, OSError, EOFError) as error:
            fault: str | None = str(error)
        else:
            fault = find_fault(*arrays)
            if fault is None:
                return arrays
        log_single_rank(
            logger,
            logging.WARNING,
            "index cache %s is unusable (%s): building it again",
            self.path("*"),
            fault,
        )
        return None

    def store(self, arrays: tuple[np.ndarray, ...]) -> None:
        """Write the entry.

        Raises:
            DataError: no write access, or no space.
        """
        try:
            os.makedirs(self.directory, exist_ok=True)
            for name, values in zip(self.names, arrays, strict=True):
                self._write(f"{name}.npy", lambda file, values=values: np.save(file, values))
            self._write(_DESCRIPTION, lambda file: file.write(self.description.encode()))
        except OSError as error:
            raise DataError(
                f"cannot write the sample index to {self.directory}: {os_error_text(error)}. Is write access "
                "missing? Name a directory you can write to as path_to_cache."
            ) from error

    def _write(self, affix: str, write: Callable) -> None:
        temporary = temporary_beside(self.path(affix))
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path(affix))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
