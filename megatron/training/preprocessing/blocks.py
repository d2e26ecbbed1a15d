"""The unit of work: a piece of one input that holds whole records."""

from dataclasses import dataclass

# Large enough that the cost per block vanishes, small enough that every worker gets many of them.
BLOCK_BYTES = 1 << 20


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


@dataclass(frozen=True)
class ArrowRows:
    """A serialised Arrow record batch (an IPC stream) whose columns are the wanted keys."""

    stream: bytes


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
