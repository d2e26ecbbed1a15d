"""Writing encoded blocks to ``.bin/.idx`` files that appear all together, finished, or not at all.

A run writes into a directory of its own beside the results; at its end everything is renamed. A run that
fails, or is killed, leaves older files as they were.
"""

import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.errors import ConfigError, DataError
from megatron.training.preprocessing.encoding import EncodedBlock, Packed
from megatron.training.processes import stop_signals

SUFFIXES = (".bin", ".idx")
_Path = str | Path


class OutputFiles:
    """The ``.bin/.idx`` pairs of a run, all in one directory.

    Args:
        prefixes: of the pairs.

    Attributes:
        unfinished: the directory to write them in, under the last part of their names.
        published: whether the finished files have their names.

    Raises:
        ConfigError: the directory is missing or cannot be written, or a directory has an output's name.
    """

    def __init__(self, prefixes: list[str]):
        self.prefixes = prefixes
        self.published = False
        self.directory = Path(prefixes[0]).absolute().parent
        if not self.directory.is_dir():
            raise ConfigError(
                f"--output-prefix: no directory {self.directory}; make it first: mkdir -p {self.directory}"
            )
        for path in self._paths():
            if os.path.isdir(path):
                raise ConfigError(f"--output-prefix: {path} is a directory; choose another prefix")
        try:
            label = f".{Path(prefixes[0]).name}.unfinished-"
            self.unfinished = Path(tempfile.mkdtemp(prefix=label, dir=self.directory))
        except OSError as error:
            raise ConfigError(
                f"--output-prefix: the directory {self.directory} cannot be written: {error.strerror}"
            ) from error

    def __enter__(self) -> "OutputFiles":
        if signals := stop_signals.installed():
            signals.describe = self._describe_stop
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def unfinished_prefixes(self) -> list[str]:
        """Where to write each pair, in the order of ``prefixes``."""
        return [str(self.unfinished / Path(prefix).name) for prefix in self.prefixes]

    def leftovers(self) -> list[Path]:
        """Unfinished directories that killed runs left behind."""
        label = self.unfinished.name.rsplit("-", 1)[0]
        found = self.directory.glob(f"{glob.escape(label)}-*")
        return sorted(path for path in found if path != self.unfinished)

    def publish(self) -> None:
        """Give the finished files their names, in place of older ones; all of them or none."""
        paths = self._paths()
        new = [self.unfinished / path.name for path in paths]
        for file in new:
            _sync(file)
        aside = [(path, self.unfinished / f"{path.name}.replaced") for path in paths if path.exists()]
        # Indices are moved away first and put in place last, so no old index ever stands beside new tokens.
        moves = [*reversed(aside), *zip(new, paths, strict=True)]
        with stop_signals.held_back():
            _rename_all(moves)
            self.published = True
        _sync(self.directory)

    def _describe_stop(self) -> str:
        if self.published:
            return "after the output files were written"
        return "before any output file was made or changed"

    def _paths(self) -> list[Path]:
        return [Path(prefix + suffix).absolute() for suffix in SUFFIXES for prefix in self.prefixes]


@contextmanager
def opened(prefixes: list[str]) -> Iterator[OutputFiles]:
    """:class:`OutputFiles` as a context, which no signal leaves before the directory will be removed."""
    with ExitStack() as stack:
        with stop_signals.held_back():
            output = stack.enter_context(OutputFiles(prefixes))
            stack.enter_context(stop_signals.unfinished(str(output.unfinished)))
        yield output


@contextmanager
def write_errors_explained(directory: Path, progress: Callable[[], str]) -> Iterator[None]:
    """Turn a failure to write into a message that says how far the run got.

    Raises:
        DataError: in place of an OSError, or of a DataError made of one (no space left, quota, ...).
    """
    try:
        yield
    except (OSError, DataError) as error:
        cause = error.__cause__ if isinstance(error, DataError) else error
        if not isinstance(cause, OSError):
            raise
        raise DataError(
            f"writing in {directory} failed: {cause.strerror or cause}, after {progress()}; free some space "
            "there, or choose another --output-prefix"
        ) from error


def _rename_all(moves: Sequence[tuple[_Path, _Path]]) -> None:
    """Rename one after the other; when one fails, undo those before it."""
    done: list[tuple[_Path, _Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except OSError:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Writer:
    """Appends encoded blocks to the data sets.

    With ``partitions`` > 1 document j goes to part j mod N, and the parts are joined at the end: the order
    that Megatron's tool gives when it deals lines out to N processes.

    Args:
        output: files to write.
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
        with write_errors_explained(output.directory, self._progress):
            self._builders = [[self._builder(part) for part in parts] for parts in self._parts]

    def append(self, block: EncodedBlock) -> None:
        """Append the documents of one block."""
        with write_errors_explained(self._output.directory, self._progress):
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
        with write_errors_explained(self._output.directory, self._progress):
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
