"""Cut every kind of input into blocks of whole records."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.errors import DataError
from megatron.training.preprocessing.blocks import Block, FileRange, LineBytes
from megatron.training.preprocessing.decompress import chunks_of
from megatron.training.preprocessing.inputs import UNITS, InputFile
from megatron.training.preprocessing.json_stream import element_lines, is_json_lines
from megatron.training.preprocessing.parquet import parquet_blocks

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PROBE_BYTES = 1 << 16


@dataclass(frozen=True)
class Source:
    """An opened input: its blocks, and what one of its records is called in messages."""

    file: InputFile
    unit: str
    blocks: Iterator[Block]


def open_source(index: int, file: InputFile, keys: list[str], block_bytes: int) -> Source:
    """Begin reading one input.

    Args:
        index: its place in the list of inputs, written into the blocks.
        keys: the wanted columns (used where a format can leave the others unread).
        block_bytes: size aimed at; a block is larger when one record is.

    Raises:
        DataError: the file cannot be read or is not what its suffix says.
    """
    unit = UNITS[file.kind]
    if file.kind == "parquet":
        return Source(file, unit, parquet_blocks(index, file, keys, block_bytes))
    chunks = None if _is_plain(file) else _without_mark(chunks_of(file))
    if file.kind == "json":
        lines_follow, chunks = is_json_lines(chunks or _without_mark(chunks_of(file)))
        if not lines_follow:
            return Source(file, "element", _line_blocks(index, element_lines(chunks, file.path), block_bytes))
    if _is_plain(file):
        return Source(file, unit, _file_ranges(index, file, block_bytes))
    return Source(file, unit, _line_blocks(index, chunks, block_bytes))


def _is_plain(file: InputFile) -> bool:
    return file.compression is None and file.is_regular


def _without_mark(chunks: Iterator[tuple[bytes, int]]) -> Iterator[tuple[bytes, int]]:
    first = True
    for chunk, done in chunks:
        yield (chunk.removeprefix(BYTE_ORDER_MARK) if first else chunk), done
        first = False


def _file_ranges(index: int, file: InputFile, block_bytes: int) -> Iterator[Block]:
    """Blocks of a regular file as byte ranges that end at a line end; only the cuts are read here."""
    try:
        with open(file.path, "rb", buffering=0) as handle:
            descriptor = handle.fileno()
            size = os.fstat(descriptor).st_size
            start = len(BYTE_ORDER_MARK) if os.pread(descriptor, 3, 0) == BYTE_ORDER_MARK else 0
            while start < size:
                end = _next_line(descriptor, start + block_bytes, size)
                yield Block(index, FileRange(file.path, start, end - start), end)
                start = end
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from error


def _next_line(descriptor: int, position: int, size: int) -> int:
    """Offset of the first line that begins at or after ``position``, or the end of the file."""
    position -= 1  # a line end right before the position means that a line begins at it
    while position < size:
        probe = os.pread(descriptor, _PROBE_BYTES, position)
        if not probe:
            break
        found = probe.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(probe)
    return size


def _line_blocks(index: int, chunks: Iterator[tuple[bytes, int]], block_bytes: int) -> Iterator[Block]:
    """Blocks of a stream, cut behind the last line end that is at hand."""
    held: list[bytes] = []
    held_bytes = done = 0
    for chunk, done in chunks:
        cut = chunk.rfind(b"\n") + 1
        if cut and held_bytes + cut >= block_bytes:
            yield Block(index, LineBytes(b"".join((*held, chunk[:cut]))), done)
            held, held_bytes, chunk = [], 0, chunk[cut:]
        held.append(chunk)
        held_bytes += len(chunk)
    if held_bytes:
        yield Block(index, LineBytes(b"".join(held)), done)
