"""The unit of work: a piece of one input that holds whole records."""

from dataclasses import dataclass
from pickle import PickleBuffer
from typing import Any


@dataclass(frozen=True)
class FileRange:
    """Lines ``offset .. offset + length`` bytes of a file; whoever parses them reads them."""

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
