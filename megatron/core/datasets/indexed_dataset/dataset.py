"""Random access to the sequences of a ``.bin``/``.idx`` pair."""

import glob
import logging
import os

import numpy as np
import torch

from megatron.core.datasets.indexed_dataset.bin_readers import (
    _BinReader,
    _FileBinReader,
    _MMapBinReader,
    _S3BinReader,
)
from megatron.core.datasets.indexed_dataset.layout import _IndexReader, get_bin_path, get_idx_path
from megatron.core.datasets.utils_s3 import (
    S3Config,
    cache_index_path,
    is_s3_path,
    make_s3_client,
    maybe_download_file,
    object_exists,
    object_size,
)
from megatron.core.errors import ConfigError, DataError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)


class IndexedDataset(torch.utils.data.Dataset):
    """The sequences of one data set.

    Pickling carries the arguments, not the data; the files are opened again on the other side.

    Args:
        path_prefix: path without ``.bin``/``.idx``, may be ``s3://...``.
        multimodal: the index has a mode per sequence.
        mmap: map the .bin into memory, else read it request by request.
        s3_config: needed for S3 prefixes, which also need ``mmap`` False.

    Raises:
        DataError: a file is missing, cut short or not of this format.
    """

    def __init__(
        self, path_prefix: str, multimodal: bool = False, mmap: bool = True, s3_config: S3Config | None = None
    ) -> None:
        super().__init__()
        self.initialize(path_prefix, multimodal, mmap, s3_config)

    def initialize(self, path_prefix: str, multimodal: bool, mmap: bool, s3_config: S3Config | None) -> None:
        """Open (or open again) the files."""
        self.path_prefix = path_prefix
        self.multimodal = multimodal
        self.mmap = mmap
        self.s3_config = s3_config
        idx_path, bin_path = get_idx_path(path_prefix), get_bin_path(path_prefix)
        if is_s3_path(path_prefix):
            idx_path = self._fetch_s3_index(idx_path)
        elif not self.exists(path_prefix):
            raise DataError(explain_missing(path_prefix))
        self.index = _IndexReader(idx_path, multimodal)
        self.bin_reader = self._open_bin(bin_path)
        self._check_bin_size(bin_path)

    def _fetch_s3_index(self, idx_path: str) -> str:
        if self.s3_config is None or self.mmap:
            raise ConfigError(
                f"{self.path_prefix} is on S3: give it an s3_cache_path for the index files, and turn "
                "mmap_bin_files off, since a remote file cannot be mapped."
            )
        local_path = cache_index_path(self.path_prefix, self.s3_config)
        maybe_download_file(idx_path, local_path)
        return local_path

    def _open_bin(self, bin_path: str) -> _BinReader:
        if is_s3_path(bin_path):
            assert self.s3_config is not None, "needed for the index"
            return _S3BinReader(bin_path, self.s3_config.bin_chunk_nbytes)
        return _MMapBinReader(bin_path) if self.mmap else _FileBinReader(bin_path)

    def _check_bin_size(self, bin_path: str) -> None:
        if is_s3_path(bin_path):
            client = make_s3_client(bin_path)
            found = object_size(client, bin_path)
            client.close()
        else:
            found = os.path.getsize(bin_path)
        expected = self.index.bin_bytes
        if found < expected:
            raise DataError(
                f"{bin_path} is cut short: its index announces {expected} bytes of tokens, but it has "
                f"{found}. Copy it again from its source, or run tools/preprocess_data.py again."
            )
        if found > expected:
            log_single_rank(
                logger,
                logging.WARNING,
                "%s has %d bytes, its index uses %d: the two may not belong together",
                bin_path,
                found,
                expected,
            )

    def __getstate__(self) -> tuple[str, bool, bool, S3Config | None]:
        return self.path_prefix, self.multimodal, self.mmap, self.s3_config

    def __setstate__(self, state: tuple[str, bool, bool, S3Config | None]) -> None:
        self.initialize(*state)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.index)

    def __getitem__(
        self, idx: int | np.integer | slice
    ) -> np.ndarray | list[np.ndarray] | tuple[np.ndarray | list[np.ndarray], np.ndarray | np.int8]:
        """Sequence ``idx``, or the list of a slice of step 1; multimodal: paired with the mode(s).

        Raises:
            ConfigError: a slice with another step.
            TypeError: neither an integer nor a slice.
        """
        if isinstance(idx, (int, np.integer)):
            return self.get(int(idx))
        if not isinstance(idx, slice):
            raise TypeError(f"an index or a slice is needed, not {type(idx).__name__}")
        start, stop, step = idx.indices(len(self))
        if step != 1:
            raise ConfigError(f"only slices of step 1 can be read, not {step}")
        lengths = self.index.sequence_lengths[start:stop]
        modes = None if self.index.sequence_modes is None else self.index.sequence_modes[start:stop]
        sequences = []
        if len(lengths):
            ends = np.cumsum(lengths, dtype=np.int64)
            run = self.bin_reader.read(
                self.index.dtype, int(ends[-1]), int(self.index.sequence_pointers[start])
            )
            sequences = np.split(run, ends[:-1])
        return sequences if modes is None else (sequences, modes)

    def get(
        self, idx: int, offset: int = 0, length: int | None = None
    ) -> np.ndarray | tuple[np.ndarray, np.int8]:
        """Tokens ``offset`` ... ``offset + length - 1`` of sequence ``idx``; multimodal: and its mode.

        Args:
            length: tokens; None for all up to the end of the sequence.

        Raises:
            IndexError: beyond the data set, or beyond the end of the sequence.
        """
        pointer, tokens, mode = self.index[idx]
        pointer, tokens = int(pointer), int(tokens)
        if length is None:
            length = tokens - offset
        if offset < 0 or length < 0 or offset + length > tokens:
            raise IndexError(
                f"sequence {idx} of {self.path_prefix} has {tokens} tokens, asked [{offset}, +{length})"
            )
        sequence = self.bin_reader.read(self.index.dtype, length, pointer + offset * self.index.dtype_size)
        return sequence if mode is None else (sequence, mode)

    @property
    def sequence_lengths(self) -> np.ndarray:
        """int32 [sequences], tokens."""
        return self.index.sequence_lengths

    @property
    def document_indices(self) -> np.ndarray:
        """int64 [documents + 1], first sequence of each document; starts with 0."""
        return self.index.document_indices

    def get_document_indices(self) -> np.ndarray:
        """Older spelling of :attr:`document_indices`."""
        return self.index.document_indices

    def set_document_indices(self, document_indices: np.ndarray) -> None:
        """Replace the document boundaries in memory."""
        self.index.document_indices = document_indices

    @property
    def sequence_modes(self) -> np.ndarray | None:
        """int8 [sequences], or None."""
        return self.index.sequence_modes

    @staticmethod
    def exists(path_prefix: str) -> bool:
        """True when both files are there."""
        paths = get_idx_path(path_prefix), get_bin_path(path_prefix)
        if is_s3_path(path_prefix):
            client = make_s3_client(path_prefix)
            found = all(object_exists(client, path) for path in paths)
            client.close()
            return found
        return all(os.path.exists(path) for path in paths)


def explain_missing(path_prefix: str) -> str:
    """Why a prefix names no data set, and what to type instead."""
    idx_path, bin_path = get_idx_path(path_prefix), get_bin_path(path_prefix)
    for there, missing in ((idx_path, bin_path), (bin_path, idx_path)):
        if os.path.exists(there):
            return (
                f"{missing} is missing, although {there} exists. A data set needs both: "
                "copy the other file too, or run tools/preprocess_data.py again."
            )
    message = f"no data set {path_prefix}: neither {idx_path} nor {bin_path} exists."
    stem, suffix = os.path.splitext(path_prefix)
    if suffix in (".bin", ".idx"):
        return f"{message} Name a data set without {suffix}: {stem}"
    near = sorted(glob.glob(glob.escape(path_prefix) + "*.idx"))
    if near:
        return f"{message} Did you mean {near[0].removesuffix('.idx')}?"
    folder = os.path.dirname(path_prefix) or "."
    if not os.path.isdir(folder):
        return f"{message} The directory {folder} does not exist. Name an existing prefix."
    here = os.getcwd()
    return f"{message} Make it with tools/preprocess_data.py, or correct the path (relative to {here})."
