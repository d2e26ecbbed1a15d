"""The run of ``tools/preprocess_data.py``, from the arguments to the renamed files, with progress lines."""

import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from megatron.core.errors import DataError, MegatronError
from megatron.training.preprocessing.encoding import Encoder, TokenizerFacts
from megatron.training.preprocessing.flags import parse_arguments
from megatron.training.preprocessing.inputs import InputFile, find_inputs
from megatron.training.preprocessing.output import OutputFiles, Writer, opened
from megatron.training.preprocessing.pool import Failure, Outcomes, WorkerPool, map_here
from megatron.training.preprocessing.readers import Block, Source, open_source
from megatron.training.preprocessing.records import RecordError

_MIB = 1024 * 1024


class Progress:
    """Prints a line to stderr each time another ``interval`` documents are done.

    Args:
        interval: documents between two lines.
        total_bytes: size of all inputs on disk; 0 when it is not known (a pipe).

    Attributes:
        documents: done so far.
        bytes_done: their records, uncompressed.
    """

    def __init__(self, interval: int, total_bytes: int):
        self._interval = interval
        self._total_bytes = total_bytes
        self._started = time.monotonic()
        self.documents = 0
        self.bytes_done = 0

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self._started, 1e-9)

    def advance(self, documents: int, size_bytes: int, bytes_read: int) -> None:
        """Count further documents, the size of their records, and the bytes of the inputs read so far."""
        due = self.documents - self.documents % self._interval + self._interval
        self.documents += documents
        self.bytes_done += size_bytes
        seconds = self.seconds
        rates = f"{self.documents / seconds:.1f} docs/s, {self.bytes_done / seconds / _MIB:.1f} MB/s"
        for count in range(due, self.documents + 1, self._interval):
            print(f"Processed {count} documents ({rates}).{self._left(seconds, bytes_read)}", file=sys.stderr)
        if due <= self.documents:
            sys.stderr.flush()

    def _left(self, seconds: float, bytes_read: int) -> str:
        if not self._total_bytes or not bytes_read:
            return ""
        share = min(1.0, bytes_read / self._total_bytes)
        left = int(seconds / share - seconds)
        return f" {share:.0%} done, {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"


# Blocks are large, so that the cost of each vanishes, yet every worker gets some of a small input.
_LARGEST_BLOCK_BYTES = 2 << 20
_SMALLEST_BLOCK_BYTES = 64 << 10
_BLOCKS_PER_WORKER = 4


def main(argv: list[str] | None = None) -> None:
    """Parse, check, run.

    Raises:
        MegatronError: whatever went wrong; no output file has then been made or changed.
    """
    args, notices = parse_arguments(argv)
    for line in notices:
        print(f"note: {line}", file=sys.stderr)
    files = find_inputs(args.input)
    level = "sentence" if args.split_sentences else "document"
    with opened([f"{args.output_prefix}_{key}_{level}" for key in args.json_keys]) as output:
        for path in output.leftovers():
            print(f"note: {path} is left of a killed run, unless that one is still at work", file=sys.stderr)
        try:
            preprocess(args, files, output)
        except MegatronError as error:
            error.args = (f"{error}\n       No output file was made or changed.",)
            raise


def preprocess(args: Namespace, files: list[InputFile], output: OutputFiles) -> None:
    """Encode all files into ``output``."""
    started = time.monotonic()
    with ExitStack() as stack:
        facts, run = _start_work(args, stack)
        # Parts of consecutive blocks joined in order are the input in its own order, so one part is enough.
        writer = Writer(output, facts.dtype, 1 if args.keep_sequential_samples else args.partitions)
        print(f"Time to startup: {time.monotonic() - started}", flush=True)
        total_bytes = sum(file.size_bytes for file in files)
        progress = Progress(args.log_interval, total_bytes)
        sources = _Sources(files, args.json_keys, _block_bytes(total_bytes, args.workers))
        _encode_all(sources, run, writer, progress)
    writer.finish()
    _summarise(output, writer, progress)


def _start_work(args: Namespace, stack: ExitStack) -> tuple[TokenizerFacts, Any]:
    build = partial(Encoder, args)
    if args.workers == 1:
        encoder = build()
        return encoder.facts, partial(map_here, encoder)
    pool = stack.enter_context(WorkerPool(build, args.workers))
    return pool.facts, pool.map_in_order


def _block_bytes(total_bytes: int, workers: int) -> int:
    share = total_bytes // (_BLOCKS_PER_WORKER * workers) or _LARGEST_BLOCK_BYTES  # the size of a pipe is 0
    return max(_SMALLEST_BLOCK_BYTES, min(_LARGEST_BLOCK_BYTES, share))


class _Sources:
    """The inputs, opened one after the other."""

    def __init__(self, files: list[InputFile], keys: list[str], block_bytes: int):
        self._files = files
        self._keys = keys
        self._block_bytes = block_bytes
        self.opened: list[Source] = []

    def blocks(self) -> Iterator[Block]:
        """All blocks of all inputs.  Raises DataError for an input without a record."""
        for index, file in enumerate(self._files):
            print(f"Opening {file.path}", flush=True)
            self.opened.append(open_source(index, file, self._keys, self._block_bytes))
            block = None
            for block in self.opened[-1].blocks:
                yield block
            if block is None:
                raise DataError(f"{file.path}: there is no document in this file; leave it out")

    def bytes_before(self, index: int) -> int:
        return sum(file.size_bytes for file in self._files[:index])


def _encode_all(sources: _Sources, run: Any, writer: Writer, progress: Progress) -> None:
    """Write every block; records are counted for each input, so that a message can say where."""
    counts: dict[int, int] = {}
    outcomes: Outcomes = run(sources.blocks())
    for block, outcome in outcomes:
        source = sources.opened[block.source]
        before = counts.get(block.source, 0)
        if isinstance(outcome, Failure):
            raise _located(outcome.error, source, before)
        counts[block.source] = before + outcome.documents
        writer.append(outcome)
        bytes_read = sources.bytes_before(block.source) + block.end
        progress.advance(outcome.documents, block.size_bytes, bytes_read)


def _located(error: MegatronError, source: Source, before: int) -> MegatronError:
    if not isinstance(error, RecordError):
        return error
    number = before + error.index + 1
    position = (
        f"{source.file.path}:{number}"
        if source.unit == "line"
        else f"{source.file.path}: {source.unit} {number}"
    )
    return DataError(f"{position}: {error.problem}")


def _summarise(output: OutputFiles, writer: Writer, progress: Progress) -> None:
    seconds = progress.seconds
    rate = progress.bytes_done / seconds / 1e6
    for prefix in output.prefixes:
        print(f"Wrote {prefix}.bin and .idx")
    print(
        f"{writer.documents} documents, {writer.sequences} sequences, {writer.tokens} tokens "
        f"in {seconds:.1f} s ({rate:.1f} MB/s of input)",
        flush=True,
    )
