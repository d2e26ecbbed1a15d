"""Bytes of a plain, gzip or zstd file, in chunks, with truncation noticed."""

import gzip
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from megatron.core.errors import ConfigError, DataError
from megatron.training.preprocessing.inputs import InputFile

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
        with gzip.GzipFile(fileobj=position) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk, position.bytes_read
    except EOFError as error:
        raise DataError(f"{path}: the gzip data stop in the middle; the file was cut short") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: this is not a sound gzip file ({error})") from error


class _Position:
    """Count what is read, so that progress can be told without a seekable file."""

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
    # The frames are walked by hand: the library's own reader takes a truncated frame for a complete one.
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
