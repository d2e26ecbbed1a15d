"""Packed arrays against the rules applied document by document."""

import pickle

import numpy as np
import pytest

from megatron.core.errors import DataError
from megatron.training.preprocessing.encoding import EncodedBlock, pack
from megatron.training.preprocessing.output import OutputFiles, Writer
from megatron.training.preprocessing.records import RecordError


def by_hand(ids, lengths, counts, eod):
    """Documents as lists of sequences."""
    ids, lengths = ids.tolist(), lengths.tolist()
    documents = []
    for count in [1] * len(lengths) if counts is None else counts.tolist():
        sequences = []
        for length in lengths[:count]:
            if length:
                sequences.append(ids[:length])
            del ids[:length]
        del lengths[:count]
        if sequences and eod is not None:
            sequences[-1] = [*sequences[-1], eod]
        documents.append(sequences)
    return documents


def documents_of(packed, documents):
    counts = packed.sequences_per_document
    counts = [1] * documents if counts is None else counts.tolist()
    ends = np.cumsum(packed.sequence_lengths)
    sequences = [part.tolist() for part in np.split(packed.tokens, ends)[: len(ends)]]
    found = []
    for count in counts:
        found.append(sequences[:count])
        del sequences[:count]
    assert not sequences and len(packed.tokens) == packed.sequence_lengths.sum()
    return found


@pytest.mark.parametrize("eod", [None, 999])
@pytest.mark.parametrize(
    "shape", ["plain", "some empty", "all empty", "no documents", "sentences", "no sentences"]
)
def test_pack_equals_a_plain_loop(shape, eod):
    rng = np.random.default_rng(3)
    smallest = {"plain": 1, "all empty": 0}.get(shape, 0)
    largest = {"all empty": 1}.get(shape, 5)
    count = {"no documents": 0, "no sentences": 0}.get(shape, 50)
    lengths = rng.integers(smallest, largest, count)
    ids = rng.integers(0, 900, lengths.sum()).astype(np.int32)
    counts = None
    if shape == "sentences":
        counts = np.diff([0, *sorted(rng.integers(0, count, 20)), count])
    elif shape == "no sentences":
        counts = np.zeros(4, np.int64)
    packed = pack(ids, lengths, counts, eod, np.uint16)
    assert packed.tokens.dtype == np.uint16 and packed.sequence_lengths.dtype == np.int32
    documents = count if counts is None else len(counts)
    assert documents_of(packed, documents) == by_hand(ids, lengths, counts, eod)


def test_pack_does_not_change_its_input():
    """Libraries hand out views of memory that they go on using."""
    ids, lengths = np.arange(6, dtype=np.int32), np.array([2, 4])
    pack(ids, lengths, None, 9, np.int32)
    assert ids.tolist() == [0, 1, 2, 3, 4, 5] and lengths.tolist() == [2, 4]


def test_record_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(RecordError(3, "why")))
    assert (error.index, error.problem) == (3, "why")


def block(*texts):
    lengths = np.array([len(text) for text in texts])
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    return EncodedBlock(len(texts), [pack(ids, lengths, None, None, np.uint16)])


def test_documents_are_dealt_to_parts_across_blocks(tmp_path):
    with OutputFiles([str(tmp_path / "out")]) as output:
        writer = Writer(output, np.uint16, partitions=2)
        for part in (block([1], [2, 2], [3]), block([4]), block([], [6])):
            writer.append(part)
        writer.finish()
    assert np.fromfile(tmp_path / "out.bin", np.uint16).tolist() == [1, 3, 2, 2, 4, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.bin", "out.idx"]


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_all_output_files_are_renamed_or_none(tmp_path, monkeypatch):
    """The last of the renames fails: those before it are undone, and the older files are back."""
    import os

    prefixes = [str(tmp_path / name) for name in ("a", "b")]
    old = {f"{name}.{suffix}": f"old {name}".encode() for name in "ab" for suffix in ("bin", "idx")}
    for name, data in old.items():
        (tmp_path / name).write_bytes(data)
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 8:
            raise PermissionError(1, "not yours")
        real(source, target)

    with OutputFiles(prefixes) as output:
        writer = Writer(output, np.uint16, 1)
        writer.append(EncodedBlock(1, [block([1]).keys[0], block([2]).keys[0]]))
        finish = output.publish
        monkeypatch.setattr(
            output, "publish", lambda: (monkeypatch.setattr(os, "replace", replace), finish())
        )
        with pytest.raises(DataError, match="not yours"):
            writer.finish()
    monkeypatch.undo()
    assert files_of(tmp_path) == old


def test_file_modes_follow_the_umask(tmp_path):
    import os

    kept = os.umask(0o027)
    try:
        with OutputFiles([str(tmp_path / "out")]) as output:
            writer = Writer(output, np.uint16, 1)
            writer.append(block([1]))
            writer.finish()
    finally:
        os.umask(kept)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
