"""Files that appear under their final name only when they are complete."""

import os
import tempfile


def temporary_beside(path: str) -> str:
    """A new empty file in the directory of ``path``, so that renaming it to ``path`` is atomic."""
    descriptor, name = tempfile.mkstemp(
        prefix=f".{os.path.basename(path)}.", suffix=".partial", dir=os.path.dirname(path) or "."
    )
    mask = os.umask(0)
    os.umask(mask)
    os.fchmod(descriptor, 0o666 & ~mask)  # mkstemp makes files private; data sets and caches are shared
    os.close(descriptor)
    return name


def sync_directory(directory: str) -> None:
    """Make renames in ``directory`` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
