"""Cutting every kind of input into blocks of whole records.

JSON that is not one record a line (an array of objects, or objects printed over several lines) is rewritten
as one record a line, so that all that follows the reader sees lines only.
"""

import codecs
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pickle import PickleBuffer
from typing import Any

from megatron.core.errors import ConfigError, DataError
from megatron.training.preprocessing.inputs import UNITS, InputFile, chunks_of


@dataclass(frozen=True)
class FileRange:
    """Lines at bytes ``offset`` to ``offset + length`` of a file; the worker that parses them reads them."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class LineBytes:
    """Records as bytes, one a line."""

    data: bytes

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return LineBytes, (PickleBuffer(self.data),)  # not copied into the pickle


@dataclass(frozen=True)
class ArrowRows:
    """A serialised Arrow record batch (an IPC stream) whose columns are the wanted keys."""

    data: bytes

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return ArrowRows, (PickleBuffer(self.data),)


@dataclass(frozen=True)
class Block:
    """Some consecutive records of one input.

    Args:
        source: index into the list of inputs.
        payload: the records, or where to read them.
        end: bytes of the input used up once this block is done (compressed bytes for a compressed file).
    """

    source: int
    payload: FileRange | LineBytes | ArrowRows
    end: int

    @property
    def size_bytes(self) -> int:
        """Uncompressed size."""
        part = self.payload
        return part.length if isinstance(part, FileRange) else len(part.data)


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
        index: of the input in the list of inputs, written into the blocks.
        keys: the wanted columns (used where a format can leave the others unread).
        block_bytes: size aimed at; a block is larger when one record is.

    Raises:
        DataError: the file cannot be read or is not what its suffix says.
    """
    unit = UNITS[file.kind]
    if file.kind == "parquet":
        return Source(file, unit, parquet_blocks(index, file, keys, block_bytes))
    chunks = _without_mark(chunks_of(file))  # which opens the file only when the first is asked for
    if file.kind == "json":
        lines_follow, chunks = is_json_lines(chunks)
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
    """Blocks of a stream, cut after the last complete line that has been read."""
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


Chunks = Iterator[tuple[bytes, int]]
_WHITE = " \t\r\n"
_SHOWN_CHARACTERS = 60


def is_json_lines(chunks: Chunks) -> tuple[bool, Chunks]:
    """Whether the first line alone is a JSON value other than an array; and the stream from its start."""
    head, taken = b"", []
    for piece in chunks:
        taken.append(piece)
        head += piece[0]
        if b"\n" in head.lstrip():
            break
    stream = chain(taken, chunks)
    text = head.lstrip()
    if text.startswith(b"["):
        return False, stream
    try:
        json.loads(text.split(b"\n", 1)[0])
    except ValueError:
        # A line that is broken for another reason is reported later, by its reader.
        return not text.startswith(b"{"), stream
    return True, stream


def element_lines(chunks: Chunks, path: str) -> Iterator[tuple[bytes, int]]:
    """Yield one line for each object of an array, or of a run of objects parted by white space.

    Raises:
        DataError: with the line and the element at which the text stops being JSON.
    """
    text = _Text(chunks, path)
    opener = text.peek()
    in_array = opener == "["
    if in_array:
        text.skip(1)
    while (mark := text.peek()) not in ("", "]"):
        if mark != "{":
            raise text.error(f"expected a JSON object, found {text.excerpt()!r}")
        # Raw line ends are white space here: JSON escapes them inside strings.
        element = text.take_object().replace("\n", " ").replace("\r", " ")
        yield element.encode("utf-8", "surrogatepass") + b"\n", text.done
        if in_array and text.peek() == ",":
            text.skip(1)
            if text.peek() == "]":
                raise text.error("a comma stands before the closing ]")
        elif in_array and text.peek() != "]":
            raise text.error(f"expected a comma or ] behind the element, found {text.excerpt()!r}")
    if in_array:
        if text.peek() != "]":
            raise text.error("the array is not closed; the file was cut short")
        text.skip(1)
    if text.peek():
        raise text.error(f"more text follows the end of the JSON value: {text.excerpt()!r}")


class _Text:
    """The decoded stream; only its unused part is kept in memory."""

    def __init__(self, chunks: Chunks, path: str):
        self._chunks = chunks
        self._path = path
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text = ""
        self._at = 0
        self._bytes_decoded = 0
        self._line = 1
        self._element = 1
        self.done = 0

    def peek(self) -> str:
        """The next character that is not white space, or "" at the end."""
        while True:
            rest = self._text[self._at : self._at + 1]
            if rest and rest not in _WHITE:
                return rest
            if rest:
                self._line += rest == "\n"
                self._at += 1
            elif not self._read_more():
                return ""

    def skip(self, characters: int) -> None:
        self._at += characters

    def excerpt(self) -> str:
        return self._text[self._at : self._at + _SHOWN_CHARACTERS]

    def take_object(self) -> str:
        """The source text of the JSON value that begins here."""
        while True:
            try:
                _, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # Reading twice as much each time keeps the parsing of one long element linear.
                behind = error.pos - self._at
                if not self._read_more(len(self._text) - self._at):
                    self._line += self._text.count("\n", self._at, self._at + behind)
                    self._at += behind
                    raise self.error(f"invalid JSON: {error.msg}, at {self.excerpt()!r}") from error
            else:
                source = self._text[self._at : end]
                self._line += source.count("\n")
                self._at = end
                self._element += 1
                return source

    def error(self, problem: str) -> DataError:
        return DataError(f"{self._path}: element {self._element} (line {self._line}): {problem}")

    def _read_more(self, at_least: int = 1) -> bool:
        self._text, self._at = self._text[self._at :], 0
        before = len(self._text)
        for chunk, done in self._chunks:
            self._text += self._decode(chunk)
            self.done = done
            if len(self._text) - before >= at_least:
                return True
        self._decode(b"", final=True)
        return len(self._text) > before

    def _decode(self, chunk: bytes, final: bool = False) -> str:
        held = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            offset = self._bytes_decoded - held + error.start
            raise DataError(
                f"{self._path}: invalid UTF-8 at byte {offset} ({error.reason}); convert the file to UTF-8"
            ) from error
        self._bytes_decoded += len(chunk)
        return text


def parquet_blocks(index: int, file: InputFile, keys: list[str], block_bytes: int) -> Iterator[Block]:
    """Blocks of a parquet file; other columns than ``keys`` are not read.

    Raises:
        DataError: the file is not parquet, lacks a column or has no rows.
        ConfigError: pyarrow is missing.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(
            f"{file.path}: reading parquet needs the package pyarrow: pip install pyarrow"
        ) from error
    try:
        table = parquet.ParquetFile(file.path)
        _check(table, file.path, keys)
        columns = list(dict.fromkeys(keys))
        done = 0
        for group in range(table.num_row_groups):
            rows = _rows_per_block(table.metadata.row_group(group), columns, block_bytes)
            for batch in table.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
                done += batch.num_rows
                end = file.size_bytes * done // table.metadata.num_rows
                yield Block(index, ArrowRows(_stream(pyarrow, batch)), end)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file.path}: this parquet file cannot be read: {error}") from error


def _check(table: Any, path: str, keys: list[str]) -> None:
    present = table.schema_arrow.names
    for key in keys:
        if key not in present:
            raise DataError(f"{path}: there is no column '{key}'; columns here: {', '.join(present)}")
    if table.metadata.num_rows == 0:
        raise DataError(f"{path}: the file has no rows; leave it out, or give it at least one document")


def _rows_per_block(group: Any, columns: list[str], block_bytes: int) -> int:
    """Rows that make about one block, from the uncompressed size of the wanted columns."""
    chunks = (group.column(i) for i in range(group.num_columns))
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    row_bytes = sum(chunk.total_uncompressed_size for chunk in wanted) / max(1, group.num_rows)
    return max(1, min(group.num_rows, int(block_bytes / max(1.0, row_bytes))))


def _stream(pyarrow: Any, batch: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def columns_of(stream: bytes, keys: list[str]) -> list[list[Any]]:
    """Back to Python values, one list for each key.  Raises UnicodeDecodeError for a string not in UTF-8."""
    import pyarrow

    table = pyarrow.ipc.open_stream(pyarrow.py_buffer(stream)).read_all()
    return [table.column(key).to_pylist() for key in keys]
