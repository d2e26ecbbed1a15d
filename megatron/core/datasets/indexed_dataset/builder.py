"""Writing a ``.bin``/``.idx`` pair."""

import os
import shutil
import weakref
from array import array
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from megatron.core.datasets.indexed_dataset.layout import (
    _IndexReader,
    _IndexWriter,
    get_bin_path,
    get_idx_path,
)
from megatron.core.datasets.utils import sync_directory, temporary_beside, write_error
from megatron.core.errors import ConfigError, DataError

_BUFFER_BYTES = 1 << 20
_WRITE_REMEDY = (
    "Nothing was written under the final name; free some space or choose another output directory."
)


class IndexedDatasetBuilder:
    """Collects sequences and documents; both files appear under their final names in :meth:`finalize`.

    Until then the tokens go to a temporary file in the directory of ``bin_path``. It is removed by
    :meth:`abandon`, on leaving a ``with`` block by an exception, when the builder is collected and at
    exit of the process. An older data set of the same name stays as it is until :meth:`finalize`.

    Args:
        bin_path: final path of the token file.
        dtype: NumPy type of the tokens on disk.
        multimodal: store a mode per sequence.

    Raises:
        DataError: the directory is missing or cannot be written, the disk is full, or a token id does
            not fit ``dtype``.
    """

    def __init__(self, bin_path: str, dtype: type[np.number] = np.int32, multimodal: bool = False) -> None:
        self.bin_path = bin_path
        self.dtype = dtype
        self.multimodal = multimodal
        self._disk_dtype = np.dtype(dtype).newbyteorder("<")
        self.sequence_lengths = array("i")
        self.sequence_modes = array("b") if multimodal else None
        self.document_indices = array("q", [0])
        directory = os.path.dirname(bin_path) or "."
        try:
            self._temporary_path = temporary_beside(bin_path)
            self._file = open(self._temporary_path, "wb", buffering=_BUFFER_BYTES)  # noqa: SIM115
        except OSError as error:
            raise write_error(bin_path, error, f"Make {directory} a directory you can write to.") from error
        self._cleanup = weakref.finalize(self, _discard, self._file, self._temporary_path, os.getpid())

    def __enter__(self) -> "IndexedDatasetBuilder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()  # after finalize there is nothing left to remove

    def add_item(self, tensor: Any, mode: int = 0) -> None:
        """Append one sequence; the document stays open until :meth:`end_document`.

        Args:
            tensor: 1-D tensor, array or list of token ids.
            mode: kept only when multimodal.
        """
        tokens = self._to_disk_dtype(tensor)
        self._write(tokens)
        self.sequence_lengths.append(tokens.size)
        if self.sequence_modes is not None:
            self.sequence_modes.append(mode)

    def end_document(self) -> None:
        """Close the document; called twice in a row it makes an empty document, which is legal."""
        self.document_indices.append(len(self.sequence_lengths))

    def add_document(self, tensor: Any, lengths: Sequence[int], modes: Sequence[int] | None = None) -> None:
        """Append a whole document.

        Args:
            tensor: 1-D tensor, array or list: the tokens of all its sequences.
            lengths: tokens of each sequence; may be empty.
            modes: mode of each sequence, 0 when None; kept only when multimodal.
        """
        tokens = self._to_disk_dtype(tensor)
        _check_total(tokens.size, sum(lengths))
        self._write(tokens)
        self.sequence_lengths.extend(lengths)
        if self.sequence_modes is not None:
            self.sequence_modes.extend(modes if modes is not None else [0] * len(lengths))
        self.end_document()

    def add_flat_documents(
        self,
        tokens: np.ndarray,
        sequence_lengths: np.ndarray,
        sequences_per_document: np.ndarray | None = None,
    ) -> None:
        """Append many documents with one write. No document may be open. Modes are 0.

        Args:
            tokens: 1-D, the tokens of all sequences, in order.
            sequence_lengths: int [sequences]; must sum to ``len(tokens)``.
            sequences_per_document: int [documents], 0 for an empty document; must sum to the number of
                sequences. None: every document is one sequence.
        """
        lengths = np.ascontiguousarray(sequence_lengths, dtype=np.int32)
        ids = self._to_disk_dtype(tokens)
        _check_total(ids.size, int(lengths.sum(dtype=np.int64)))
        first = len(self.sequence_lengths)
        if sequences_per_document is None:
            ends = np.arange(first + 1, first + len(lengths) + 1, dtype=np.int64)
        else:
            ends = first + np.cumsum(sequences_per_document, dtype=np.int64)
            if (int(ends[-1]) if len(ends) else first) != first + len(lengths):
                raise ConfigError(
                    f"documents cover {ends[-1:] - first} sequences, but {len(lengths)} were given"
                )
        self._write(ids)
        self.sequence_lengths.frombytes(lengths.tobytes())
        self.document_indices.frombytes(ends.tobytes())
        if self.sequence_modes is not None:
            self.sequence_modes.frombytes(bytes(len(lengths)))

    def add_index(self, path_prefix: str) -> None:
        """Append another data set, which must have the same dtype (and modes, when this one has)."""
        idx_path, bin_path = get_idx_path(path_prefix), get_bin_path(path_prefix)
        for path in (idx_path, bin_path):
            if not os.path.exists(path):
                raise DataError(f"cannot append {path_prefix}: {path} does not exist.")
        index = _IndexReader(idx_path, self.multimodal)
        if index.dtype != self.dtype:
            raise DataError(
                f"cannot append {path_prefix}: it holds {index.dtype.__name__} tokens and this data set "
                f"{np.dtype(self.dtype).name}. Make both with the same tokenizer and vocabulary size."
            )
        if os.path.getsize(bin_path) != index.bin_bytes:
            raise DataError(
                f"cannot append {path_prefix}: {bin_path} has {os.path.getsize(bin_path)} bytes, "
                f"its index announces {index.bin_bytes}. Copy it again from its source."
            )
        first = len(self.sequence_lengths)
        with open(bin_path, "rb") as source, _write_errors(self.bin_path):
            shutil.copyfileobj(source, self._file, _BUFFER_BYTES)
        self.sequence_lengths.frombytes(index.sequence_lengths.tobytes())
        self.document_indices.frombytes((index.document_indices[1:] + first).tobytes())
        if self.sequence_modes is not None:
            assert index.sequence_modes is not None, "it is as multimodal as this one"
            self.sequence_modes.frombytes(index.sequence_modes.tobytes())

    def finalize(self, idx_path: str) -> None:
        """Write the index, sync both files to disk and give them their final names."""
        temporary_idx = None
        try:
            with _write_errors(self.bin_path):
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            with _write_errors(idx_path):
                temporary_idx = temporary_beside(idx_path)
                with _IndexWriter(temporary_idx, self.dtype) as writer:
                    writer.write(self.sequence_lengths, self.sequence_modes, self.document_indices)
                os.replace(self._temporary_path, self.bin_path)
                os.replace(temporary_idx, idx_path)
                sync_directory(os.path.dirname(idx_path) or ".")
        except BaseException:
            if temporary_idx is not None:
                with suppress(OSError):
                    os.unlink(temporary_idx)
            self.abandon()
            raise
        self._cleanup.detach()

    def abandon(self) -> None:
        """Give up: remove the temporary file. Harmless after :meth:`finalize`."""
        self._cleanup()

    def _write(self, tokens: np.ndarray) -> None:
        with _write_errors(self.bin_path):
            self._file.write(tokens.data if tokens.size else b"")

    def _to_disk_dtype(self, tokens: Any) -> np.ndarray:
        """Contiguous array of the type on disk; an id that does not fit is an error, not a wrap-around."""
        given = np.asarray(tokens.numpy() if hasattr(tokens, "numpy") else tokens).reshape(-1)
        if given.dtype != self._disk_dtype and given.size and np.issubdtype(self._disk_dtype, np.integer):
            limits = np.iinfo(self._disk_dtype)
            for extreme in (given.min(), given.max()):
                if not limits.min <= extreme <= limits.max:
                    raise DataError(
                        f"token id {extreme} does not fit {self._disk_dtype.name}, the type of "
                        f"{self.bin_path} ({limits.min} to {limits.max}). Pass the tokenizer's true "
                        "vocabulary size when choosing the type: DType.optimal_dtype(vocab_size)."
                    )
        return np.ascontiguousarray(given, dtype=self._disk_dtype)


def _check_total(tokens: int, lengths: int) -> None:
    if tokens != lengths:
        raise ConfigError(f"the sequence lengths sum to {lengths}, but {tokens} tokens were given")


def _discard(file: BinaryIO, path: str, owner: int) -> None:
    """Close and remove, in the process that made the file only (a forked child shares the object)."""
    if os.getpid() != owner:
        return
    with suppress(OSError, ValueError):
        file.close()
    with suppress(OSError):
        os.unlink(path)


@contextmanager
def _write_errors(path: str):
    try:
        yield
    except OSError as error:
        raise write_error(path, error, _WRITE_REMEDY) from error
