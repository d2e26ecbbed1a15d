"""The ``.idx`` file: type codes, header, arrays.

All integers are little-endian::

    offset  size  content
    0       9     ``MMIDIDX`` and two zero bytes
    9       8     uint64 version, 1
    17      1     uint8 type code
    18      8     uint64 S, number of sequences
    26      8     uint64 D, number of document entries (documents + 1)
    34      4 S   int32 tokens per sequence
            8 S   int64 byte offset of each sequence in the .bin
            8 D   int64 first sequence of each document; the last entry is S
            S     int8 mode of each sequence, in multimodal files only
"""

import os
import struct
from collections.abc import Sequence
from enum import Enum
from types import TracebackType

import numpy as np

from megatron.core.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_UINT16_VOCABULARY_LIMIT = 65500


class DType(Enum):
    """Type codes of the token ids."""

    uint8 = 1
    int8 = 2
    int16 = 3
    int32 = 4
    int64 = 5
    float64 = 6
    float32 = 7
    uint16 = 8

    @classmethod
    def code_from_dtype(cls, value: type[np.number]) -> int:
        """NumPy type -> code."""
        return cls[np.dtype(value).name].value

    @classmethod
    def dtype_from_code(cls, value: int) -> type[np.number]:
        """Code -> NumPy type."""
        return getattr(np, cls(value).name)

    @staticmethod
    def size(key: int | type[np.number]) -> int:
        """Bytes per token of a code or a NumPy type."""
        if isinstance(key, int):
            key = DType.dtype_from_code(key)
        return np.dtype(key).itemsize

    @staticmethod
    def optimal_dtype(cardinality: int | None) -> type[np.integer]:
        """uint16 for a known vocabulary of less than 65500 ids, else int32."""
        if cardinality is not None and cardinality < _UINT16_VOCABULARY_LIMIT:
            return np.uint16
        return np.int32


def get_idx_path(path_prefix: str) -> str:
    """``P`` -> ``P.idx``."""
    return path_prefix + ".idx"


def get_bin_path(path_prefix: str) -> str:
    """``P`` -> ``P.bin``."""
    return path_prefix + ".bin"


def index_bytes(sequences: int, document_entries: int, multimodal: bool) -> int:
    """Size of an .idx file."""
    return _HEADER.size + 12 * sequences + 8 * document_entries + (sequences if multimodal else 0)


class _IndexWriter:
    """Writes one .idx file; use as a context manager."""

    def __init__(self, idx_path: str, dtype: type[np.number]) -> None:
        self.idx_path = idx_path
        self.dtype = dtype

    def __enter__(self) -> "_IndexWriter":
        self._file = open(self.idx_path, "wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(
        self,
        sequence_lengths: Sequence[int] | np.ndarray,
        sequence_modes: Sequence[int] | np.ndarray | None,
        document_indices: Sequence[int] | np.ndarray,
    ) -> None:
        """Write header and arrays; the byte offsets are the running sum of the lengths."""
        lengths = np.asarray(sequence_lengths, dtype="<i4")
        documents = np.asarray(document_indices, dtype="<i8")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype=np.int64, out=pointers[1:])
        pointers *= DType.size(self.dtype)
        code = DType.code_from_dtype(self.dtype)
        self._file.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(documents)))
        for block in (lengths, pointers, documents):
            self._file.write(block.tobytes())
        if sequence_modes is not None:
            self._file.write(np.asarray(sequence_modes, dtype=np.int8).tobytes())


class _IndexReader:
    """Memory-mapped .idx file.

    Attributes:
        dtype, dtype_size: of the tokens in the .bin
        sequence_lengths: int32 [S]
        sequence_pointers: int64 [S], bytes
        document_indices: int64 [D]
        sequence_modes: int8 [S], or None unless multimodal

    Raises:
        DataError: not an index file, another version, an unknown type code, cut short, or inconsistent.
    """

    def __init__(self, idx_path: str, multimodal: bool) -> None:
        self.idx_path = idx_path
        size = os.path.getsize(idx_path)
        with open(idx_path, "rb") as file:
            header = file.read(_HEADER.size)
        self._read_header(header, size)
        expected = index_bytes(self.sequence_count, self._document_entries, multimodal)
        if size < expected:
            hint = " (or it is not a multimodal data set)" if multimodal else ""
            raise DataError(
                f"{idx_path} is cut short{hint}: its header announces {self.sequence_count} sequences and "
                f"{self._document_entries} document entries, {expected} bytes, but it has {size}. "
                "Copy it again from its source, or run tools/preprocess_data.py again."
            )
        self._map_arrays(np.memmap(idx_path, mode="r", dtype=np.uint8), multimodal)

    def _read_header(self, header: bytes, size: int) -> None:
        if header[: len(_MAGIC)] != _MAGIC[: len(header)]:
            raise DataError(
                f"{self.idx_path} is not an index file of this format: it starts with "
                f"{header[: len(_MAGIC)]!r} instead of {_MAGIC!r} ({size} bytes). "
                "Make the data set with tools/preprocess_data.py."
            )
        if len(header) < _HEADER.size:
            raise DataError(
                f"{self.idx_path} is cut short: {size} bytes, the header alone has {_HEADER.size}. "
                "Copy it again from its source, or run tools/preprocess_data.py again."
            )
        _, version, code, self.sequence_count, self._document_entries = _HEADER.unpack(header)
        if version != _VERSION:
            raise DataError(
                f"{self.idx_path} has format version {version}; only version {_VERSION} can be read. "
                "Make the data set again with tools/preprocess_data.py."
            )
        codes = {member.value for member in DType}
        if code not in codes:
            raise DataError(
                f"{self.idx_path} announces token type code {code}; known codes are {min(codes)} to "
                f"{max(codes)}. The file is damaged: copy it again from its source."
            )
        self.dtype = DType.dtype_from_code(code)
        self.dtype_size = DType.size(self.dtype)

    def _map_arrays(self, buffer: np.memmap, multimodal: bool) -> None:
        count, entries = self.sequence_count, self._document_entries
        view = buffer.data
        at = _HEADER.size
        self.sequence_lengths = np.frombuffer(view, dtype="<i4", count=count, offset=at)
        at += 4 * count
        self.sequence_pointers = np.frombuffer(view, dtype="<i8", count=count, offset=at)
        at += 8 * count
        self.document_indices = np.frombuffer(view, dtype="<i8", count=entries, offset=at)
        at += 8 * entries
        self.sequence_modes = (
            np.frombuffer(view, dtype=np.int8, count=count, offset=at) if multimodal else None
        )
        last = int(self.document_indices[-1]) if entries else None
        if last != count:
            raise DataError(
                f"{self.idx_path} is damaged: its documents end at sequence {last}, but it has {count} "
                "sequences. Copy it again from its source, or run tools/preprocess_data.py again."
            )

    @property
    def bin_bytes(self) -> int:
        """Bytes the .bin must have."""
        if self.sequence_count == 0:
            return 0
        return int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype_size

    def __len__(self) -> int:
        return self.sequence_count

    def __getitem__(self, idx: int) -> tuple[np.int32, np.int64, np.int8 | None]:
        """(byte offset, tokens, mode or None) of sequence ``idx``."""
        mode = self.sequence_modes[idx] if self.sequence_modes is not None else None
        return self.sequence_pointers[idx], self.sequence_lengths[idx], mode
