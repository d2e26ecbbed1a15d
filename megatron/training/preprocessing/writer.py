"""Encoded blocks to ``.bin/.idx``, one pair for each key."""

import os

import numpy as np

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training.preprocessing.encoding import EncodedBlock, Packed
from megatron.training.preprocessing.output import SUFFIXES, OutputFiles, failures_told


class Writer:
    """Appends encoded blocks to the data sets.

    With ``partitions`` > 1 document j goes to part j mod N, and the parts are joined at the end: the order
    that Megatron's tool gives when it deals lines out to N processes.

    Args:
        output: where to.
        dtype: of the data sets.
        partitions: number of parts.

    Raises:
        DataError: from every method, when the file system does not take the data.
    """

    def __init__(self, output: OutputFiles, dtype: type[np.number], partitions: int):
        self._output = output
        self._dtype = dtype
        self._partitions = partitions
        self.documents = self.sequences = self.tokens = 0
        prefixes = output.unfinished_prefixes()
        parts = range(partitions)
        self._parts = [
            [f"{name}.part{part}" if partitions > 1 else name for part in parts] for name in prefixes
        ]
        with failures_told(output.directory, self._progress):
            self._builders = [[self._builder(part) for part in parts] for parts in self._parts]

    def append(self, block: EncodedBlock) -> None:
        """Append the documents of one block."""
        with failures_told(self._output.directory, self._progress):
            for builders, packed in zip(self._builders, block.keys, strict=True):
                for part, builder in enumerate(builders):
                    mine = packed if len(builders) == 1 else self._share(packed, block.documents, part)
                    builder.add_flat_documents(
                        mine.tokens, mine.sequence_lengths, mine.sequences_per_document
                    )
                self.tokens += len(packed.tokens)
                self.sequences += len(packed.sequence_lengths)
        self.documents += block.documents

    def finish(self) -> None:
        """Write the indices and give all files their final names."""
        with failures_told(self._output.directory, self._progress):
            for parts, builders in zip(self._parts, self._builders, strict=True):
                for part, builder in zip(parts, builders, strict=True):
                    builder.finalize(part + ".idx")
            if self._partitions > 1:
                for parts, prefix in zip(self._parts, self._output.unfinished_prefixes(), strict=True):
                    self._join(parts, prefix)
            self._output.publish()

    def _builder(self, prefix: str) -> IndexedDatasetBuilder:
        return IndexedDatasetBuilder(prefix + ".bin", dtype=self._dtype)

    def _join(self, parts: list[str], prefix: str) -> None:
        builder = self._builder(prefix)
        for part in parts:
            builder.add_index(part)
            for suffix in SUFFIXES:
                os.unlink(part + suffix)
        builder.finalize(prefix + ".idx")

    def _share(self, packed: Packed, documents: int, part: int) -> Packed:
        """The documents of this block that belong to one part."""
        wanted = (np.arange(documents) + self.documents) % self._partitions == part
        counts = packed.sequences_per_document
        of_sequence = wanted if counts is None else np.repeat(wanted, counts)
        return Packed(
            packed.tokens[np.repeat(of_sequence, packed.sequence_lengths)],
            packed.sequence_lengths[of_sequence],
            None if counts is None else counts[wanted],
        )

    def _progress(self) -> str:
        written = self.tokens * np.dtype(self._dtype).itemsize
        return f"{written} bytes of tokens from {self.documents} documents"
