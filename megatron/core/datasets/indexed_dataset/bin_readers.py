"""Three ways to get at the tokens of a ``.bin``: memory map, plain reads, S3."""

from abc import ABC, abstractmethod

import numpy as np

from megatron.core.datasets.utils_s3 import make_s3_client, parse_s3_path
from megatron.core.errors import DataError


class _BinReader(ABC):
    """Reads a run of tokens."""

    @abstractmethod
    def read(self, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        """``count`` tokens from byte ``offset``, as a 1-D array."""


class _MMapBinReader(_BinReader):
    """The .bin mapped into memory; arrays are read-only views of it."""

    def __init__(self, bin_path: str) -> None:
        self._bin_path = bin_path
        with open(bin_path, "rb") as file:
            empty = file.seek(0, 2) == 0
        # An empty file cannot be mapped; a data set without tokens is legal.
        self._buffer = memoryview(b"") if empty else np.memmap(bin_path, mode="r", dtype=np.uint8).data

    def read(self, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        return np.frombuffer(self._buffer, dtype=dtype, count=count, offset=offset)


class _FileBinReader(_BinReader):
    """Opens, seeks and reads for every request: no address space, no open file between requests."""

    def __init__(self, bin_path: str) -> None:
        self._bin_path = bin_path

    def read(self, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        sequence = np.empty(count, dtype=dtype)
        with open(self._bin_path, "rb", buffering=0) as file:
            file.seek(offset)
            view = sequence.data.cast("B") if count else memoryview(b"")
            filled = 0
            while filled < len(view):
                got = file.readinto(view[filled:])
                if not got:
                    raise DataError(
                        f"{self._bin_path} ends before byte {offset + len(view)}: it was cut short after it "
                        "had been opened. Copy it again from its source."
                    )
                filled += got
        return sequence


class _S3BinReader(_BinReader):
    """Ranged S3 reads; the block of ``bin_chunk_nbytes`` around the last request is kept."""

    def __init__(self, bin_path: str, bin_chunk_nbytes: int) -> None:
        if bin_chunk_nbytes <= 0:
            raise DataError(f"the S3 block size must be positive, not {bin_chunk_nbytes} bytes.")
        self._bin_path = bin_path
        self._chunk_bytes = bin_chunk_nbytes
        self._bucket, self._key = parse_s3_path(bin_path)
        self._client = make_s3_client(bin_path)
        self._cache = b""
        self._cache_start = 0

    def _fetch(self, start: int, stop: int) -> bytes:
        """Bytes start ... stop - 1; fewer where the object ends."""
        answer = self._client.get_object(
            Bucket=self._bucket, Key=self._key, Range=f"bytes={start}-{stop - 1}"
        )
        return answer["Body"].read()

    def read(self, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype=dtype)
        stop = offset + count * np.dtype(dtype).itemsize
        if offset < self._cache_start or stop > self._cache_start + len(self._cache):
            # Blocks start at multiples of their size, so neighbouring requests share one.
            start = offset // self._chunk_bytes * self._chunk_bytes
            self._cache = self._fetch(start, max(stop, start + self._chunk_bytes))
            self._cache_start = start
        begin = offset - self._cache_start
        if begin + (stop - offset) > len(self._cache):
            raise DataError(
                f"{self._bin_path} ended at byte {self._cache_start + len(self._cache)}, needed {stop}."
            )
        return np.frombuffer(self._cache[begin : begin + (stop - offset)], dtype=dtype)

    def __del__(self) -> None:
        if hasattr(self, "_client"):
            self._client.close()
