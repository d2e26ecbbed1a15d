"""Reading the wanted values from a block, and errors for records that have none.

The common case is one pass of the fast parser over the lines of a block. Only when that fails are the records
parsed one by one; the standard library then accepts what the fast parser does not (``NaN`` in a field that is
not read), and everything else is a :class:`RecordError` with the position and a remedy.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

from megatron.core.errors import DataError
from megatron.training.preprocessing.pool import PortableError
from megatron.training.preprocessing.readers import ArrowRows, Block, FileRange, columns_of

try:
    from orjson import loads as _fast_loads
except ImportError:  # the fast parser is a matter of speed only

    def _fast_loads(obj: bytes | bytearray | memoryview | str, /) -> Any:
        raise ValueError("no fast parser")


_TYPE_NAMES = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", dict: "an object",
               list: "a list", bytes: "bytes"}  # fmt: skip
_SHOWN_CHARACTERS = 60


class RecordError(PortableError):
    """A record that cannot be used.

    Args:
        index: of the record in the block.
        problem: what is wrong and how to mend it, without the position.
    """

    def __init__(self, index: int, problem: str):
        super().__init__(index, problem)
        self.index = index
        self.problem = problem


def values_of(block: Block, keys: list[str]) -> list[list[Any]]:
    """Values of each key, one for each record, every one a string or a list of strings.

    Raises:
        RecordError: the first record that lacks a key or has something else there.
        DataError: the input changed while it was read.
    """
    if isinstance(block.payload, ArrowRows):
        columns = _arrow_values(block.payload.data, keys)
    else:
        columns = _line_values(_data_of(block), keys)
    for key, column in zip(keys, columns, strict=True):
        if not all(type(value) is str for value in column):
            _check_types(key, column)
    return columns


def _data_of(block: Block) -> bytes:
    payload = block.payload
    if isinstance(payload, FileRange):
        return _read_range(payload)
    return bytes(payload.data)  # out of shared memory, where only bytes can be searched


def _read_range(part: FileRange) -> bytes:
    with open(part.path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), part.length, part.offset)
        while len(data) < part.length:
            more = os.pread(file.fileno(), part.length - len(data), part.offset + len(data))
            if not more:
                raise DataError(f"{part.path}: the file became shorter while it was read")
            data += more
    return data


def _line_values(data: bytes, keys: list[str]) -> list[list[Any]]:
    try:
        if len(keys) == 1:
            key = keys[0]
            return [[record[key] for record in _fast_records(data)]]
        rows = [[record[key] for key in keys] for record in _fast_records(data)]
    except (ValueError, KeyError, TypeError, IndexError):
        lines = data.removesuffix(b"\n").split(b"\n")
        rows = [_careful_values(index, line, keys) for index, line in enumerate(lines)]
    return [list(column) for column in zip(*rows, strict=True)]


def _fast_records(data: bytes) -> Iterator[Any]:
    """Parse the lines where they lie: cutting them out first costs a third of the parsing."""
    view, find = memoryview(data), data.find
    start, size = 0, len(data)
    while start < size:
        end = find(b"\n", start)
        end = size if end < 0 else end
        yield _fast_loads(view[start:end])
        start = end + 1


def _careful_values(index: int, line: bytes, keys: list[str]) -> list[Any]:
    record = _careful_record(index, line)
    values = []
    for key in keys:
        if key not in record:
            present = ", ".join(repr(name) for name in record) or "none"
            raise RecordError(index, f"the key '{key}' is missing; keys here: {present}. See --json-keys")
        _check_surrogates(index, key, record[key])
        values.append(record[key])
    return values


def _careful_record(index: int, line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise RecordError(
            index, r"the line is blank; remove blank lines first, as with: sed -i '/^[[:space:]]*$/d' FILE"
        )
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(
            index,
            f"invalid UTF-8 at byte {error.start} of the line ({error.reason}: "
            f"0x{line[error.start]:02x}); convert the file to UTF-8, as with iconv",
        ) from error
    try:
        record = json.loads(text)
    except RecursionError as error:
        raise RecordError(index, "the JSON is nested too deeply") from error
    except json.JSONDecodeError as error:
        near = _excerpt(text, error.pos)
        raise RecordError(
            index, f"invalid JSON: {error.msg} at character {error.pos}, near {near}"
        ) from error
    except ValueError as error:  # an integer of thousands of digits
        raise RecordError(index, f"invalid JSON: {error}") from error
    if not isinstance(record, dict):
        hint = "; a file that is one JSON array must be named .json" if text.lstrip().startswith("[") else ""
        raise RecordError(index, f"expected a JSON object, found {_type_name(record)}{hint}")
    return record


def _check_surrogates(index: int, key: str, value: Any) -> None:
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            continue
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise RecordError(
                index,
                f"the key '{key}' has half of a surrogate pair, \\u{code:04x}, at character {error.start}, "
                "which is no character; write the whole pair, or U+FFFD in its place",
            ) from error


def _arrow_values(stream: bytes, keys: list[str]) -> list[list[Any]]:
    try:
        return columns_of(stream, keys)
    except UnicodeDecodeError as error:
        raise RecordError(0, f"this row or one of the next holds invalid UTF-8 ({error.reason})") from error


def _check_types(key: str, column: list[Any]) -> None:
    for index, value in enumerate(column):
        if isinstance(value, str):
            continue
        if not isinstance(value, list):
            raise RecordError(index, _wrong_type(f"the key '{key}'", value))
        for position, item in enumerate(value):
            if not isinstance(item, str):
                raise RecordError(index, _wrong_type(f"item {position} of the key '{key}'", item))


def _wrong_type(where: str, value: Any) -> str:
    shown = "" if value is None or isinstance(value, (dict, list, bytes)) else f" ({value!r:.40})"
    return f"{where} is {_type_name(value)}{shown}, expected a string or a list of strings"


def _type_name(value: Any) -> str:
    return _TYPE_NAMES.get(type(value), "a string" if isinstance(value, str) else type(value).__name__)


def _excerpt(text: str, position: int) -> str:
    start = max(0, position - _SHOWN_CHARACTERS // 2)
    end = start + _SHOWN_CHARACTERS
    return ("... " if start else "") + repr(text[start:end]) + (" ..." if end < len(text) else "")
