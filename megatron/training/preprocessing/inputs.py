"""Which files are read, and what kind each of them is."""

import glob
import os
import stat
from dataclasses import dataclass

from megatron.core.errors import DataError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
# What one record of each kind is called in messages.
UNITS = {"lines": "line", "json": "line", "parquet": "row"}


@dataclass(frozen=True)
class InputFile:
    """One input.

    Args:
        path: as the user wrote it, or as the pattern gave it.
        kind: "lines" (JSON lines), "json" (lines, or one array, or one object) or "parquet".
        compression: "gzip", "zstd" or None.
        size_bytes: size on disk, 0 for a pipe.
        is_regular: False for a pipe, which can be read only once and only in order.
    """

    path: str
    kind: str
    compression: str | None
    size_bytes: int
    is_regular: bool


def find_inputs(patterns: list[str]) -> list[InputFile]:
    """Expand patterns (sorted by name) and look at every file.

    Raises:
        DataError: a name that matches nothing, or a directory, or a file that is empty or unreadable.
    """
    return [_inspect(path) for pattern in patterns for path in _expand(pattern)]


def _expand(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    if not glob.has_magic(pattern):
        raise DataError(f"--input {pattern}: there is no such file")
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise DataError(f"--input {pattern}: no file matches this pattern")
    return paths


def _inspect(path: str) -> InputFile:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise DataError(
                f"--input {path} is a directory; name its files, such as '{path.rstrip('/')}/*.jsonl'"
            )
        is_regular = stat.S_ISREG(status.st_mode)
        if is_regular:
            with open(path, "rb"):
                pass
    except OSError as error:
        raise DataError(f"--input {path} cannot be read: {error.strerror or error}") from error
    if is_regular and status.st_size == 0:
        raise DataError(f"{path}: the file is empty; leave it out, or give it at least one document")
    kind, compression = _kind_of(path)
    return InputFile(path, kind, compression, status.st_size if is_regular else 0, is_regular)


def _kind_of(path: str) -> tuple[str, str | None]:
    """A name with any other suffix is taken for JSON lines, as Megatron does."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = {".parquet": "parquet", ".json": "json"}.get(suffix, "lines")
    if kind == "parquet" and compression:
        raise DataError(f"{path}: a compressed parquet file cannot be read in pieces; decompress it first")
    return kind, compression
