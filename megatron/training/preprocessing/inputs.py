"""Input files: which are read, what kind each of them is, and their uncompressed bytes."""

import glob
import gzip
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from megatron.core.errors import ConfigError, DataError

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
    """Expand patterns (sorted by name) and inspect every file.

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
    """Kind and compression by suffix; a name with any other suffix is JSON lines, as in Megatron."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = {".parquet": "parquet", ".json": "json"}.get(suffix, "lines")
    if kind == "parquet" and compression:
        raise DataError(f"{path}: a compressed parquet file cannot be read in pieces; decompress it first")
    return kind, compression


CHUNK_BYTES = 1 << 20


def chunks_of(source: InputFile) -> Iterator[tuple[bytes, int]]:
    """Yield (uncompressed bytes, bytes of the file read so far).

    Raises:
        DataError: the file cannot be read, is not what its suffix says, or was cut short.
        ConfigError: the library for this compression is missing.
    """
    inflate = {None: _plain, "gzip": _gzip, "zstd": _zstd}[source.compression]
    try:
        with open(source.path, "rb") as file:
            yield from inflate(file, source.path)
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error.strerror or error}") from error


def _plain(file: BinaryIO, path: str) -> Iterator[tuple[bytes, int]]:
    done = 0
    while chunk := file.read(CHUNK_BYTES):
        done += len(chunk)
        yield chunk, done


def _gzip(file: BinaryIO, path: str) -> Iterator[tuple[bytes, int]]:
    position = _Position(file)
    try:
        with gzip.GzipFile(fileobj=cast(BinaryIO, position)) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk, position.bytes_read
    except EOFError as error:
        raise DataError(f"{path}: the gzip data stop in the middle; the file was cut short") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: this is not a sound gzip file ({error})") from error


class _Position:
    """Counts the bytes read, which gives the progress of files that cannot seek."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.bytes_read = 0

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.bytes_read += len(data)
        return data


def _zstd(file: BinaryIO, path: str) -> Iterator[tuple[bytes, int]]:
    try:
        import zstandard
    except ImportError as error:
        raise ConfigError(
            f"{path}: reading .zst needs the package zstandard: pip install zstandard"
        ) from error
    # Frame by frame, because the library's own reader accepts a truncated frame as complete.
    decompressor = zstandard.ZstdDecompressor()
    frame, done = None, 0
    try:
        while chunk := file.read(CHUNK_BYTES):
            done += len(chunk)
            while chunk:
                frame = frame or decompressor.decompressobj()
                if data := frame.decompress(chunk):
                    yield data, done
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: this is not a sound zstd file ({error})") from error
    if frame is not None:
        raise DataError(f"{path}: the zstd data stop in the middle; the file was cut short")
