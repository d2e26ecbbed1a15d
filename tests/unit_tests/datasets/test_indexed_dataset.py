"""Reading and writing .bin/.idx pairs."""

import hashlib
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
    _IndexReader,
    get_bin_path,
    get_idx_path,
)
from megatron.core.errors import DataError

PREFIXES = ["u16_text_document", "i32_text_document", "b_noeod_text_document", "multi"]


def same_files(prefix: str | Path, golden: str | Path) -> bool:
    return all(
        Path(f"{prefix}{e}").read_bytes() == Path(f"{golden}{e}").read_bytes() for e in (".bin", ".idx")
    )


def by_item(builder: IndexedDatasetBuilder, documents: list) -> None:
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence.astype(np.int64)))
        builder.end_document()


def by_document(builder: IndexedDatasetBuilder, documents: list) -> None:
    for sequences in documents:
        tokens = np.concatenate(sequences) if sequences else []
        builder.add_document(tokens, [len(sequence) for sequence in sequences])


def in_bulk(builder: IndexedDatasetBuilder, documents: list) -> None:
    half = len(documents) // 2
    for part in (documents[:half], documents[half:]):
        sequences = [sequence for document in part for sequence in document]
        lengths = np.array([len(sequence) for sequence in sequences])
        counts = np.array([len(document) for document in part])
        simple = len(counts) and (counts == 1).all()
        builder.add_flat_documents(np.concatenate(sequences), lengths, None if simple else counts)


@pytest.mark.parametrize("fill", [by_item, by_document, in_bulk])
@pytest.mark.parametrize("name", PREFIXES)
def test_rebuilt_files_are_equal(data, tmp_path, name, fill):
    source = IndexedDataset(str(data / name))
    ends = source.document_indices
    documents = [source[a:b] for a, b in pairwise(ends.tolist())]
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=source.index.dtype)
    fill(builder, documents)
    builder.finalize(str(tmp_path / "x.idx"))
    assert same_files(tmp_path / "x", data / name)
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("name,dtype", [("mm", np.int32), ("multi", np.uint16)])
def test_files_from_recorded_contents(data, tmp_path, name, dtype):
    documents = json.loads((data / "indexed_extra.json").read_text())[name]
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype, multimodal=name == "mm")
    for document in documents:
        builder.add_document(document["tokens"], document["lengths"], document.get("modes"))
    builder.finalize(str(tmp_path / "x.idx"))
    assert same_files(tmp_path / "x", data / name)


@pytest.mark.parametrize("mmap", [True, False])
def test_reading(data, mmap):
    contents = json.loads((data / "indexed_extra.json").read_text())["multi"]
    dataset = IndexedDataset(str(data / "multi"), mmap=mmap)
    lengths = [length for document in contents for length in document["lengths"]]
    tokens = np.concatenate([document["tokens"] for document in contents])
    expected = np.split(tokens, np.cumsum(lengths)[:-1])
    assert len(dataset) == len(lengths)
    assert dataset.sequence_lengths.tolist() == lengths
    assert dataset.get_document_indices().tolist() == [0, 2, 2, 3, 6, 7, 7, 11, 13]
    for i, sequence in enumerate(expected):
        assert dataset[i].dtype == np.uint16
        assert dataset[np.int64(i)].tolist() == sequence.tolist()
        assert dataset.get(i, offset=1).tolist() == sequence[1:].tolist()
        assert dataset.get(i, offset=1, length=0).tolist() == []
    assert dataset.get(8, 1, 2).tolist() == expected[8][1:3].tolist()
    assert [part.tolist() for part in dataset[2:5]] == [part.tolist() for part in expected[2:5]]
    assert dataset[5:5] == []
    again = pickle.loads(pickle.dumps(dataset))
    assert again[3].tolist() == expected[3].tolist()
    assert type(again.bin_reader) is type(dataset.bin_reader)


def test_bad_requests(data):
    dataset = IndexedDataset(str(data / "multi"))
    with pytest.raises(ValueError, match="step 1"):
        dataset[0:4:2]
    with pytest.raises(TypeError, match="str"):
        dataset["a"]
    with pytest.raises(IndexError):
        dataset[13]
    with pytest.raises(IndexError, match="5 tokens"):
        dataset.get(0, offset=2, length=4)


def test_modes(data):
    contents = json.loads((data / "indexed_extra.json").read_text())["mm"]
    modes = [mode for document in contents for mode in document["modes"]]
    dataset = IndexedDataset(str(data / "mm"), multimodal=True)
    assert dataset.sequence_modes.tolist() == modes
    sequence, mode = dataset[1]
    assert (sequence.tolist(), mode) == ([51, 41, 32], 1)
    sequences, several = dataset[1:3]
    assert ([part.tolist() for part in sequences], several.tolist()) == ([[51, 41, 32], [87, 31, 74]], [1, 0])
    assert IndexedDataset(str(data / "mm"))[1].tolist() == [51, 41, 32]  # a plain reader ignores the modes


def test_merge(data, tmp_path):
    recorded = json.loads((data / "indexed_extra.json").read_text())["merge"]
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    for name in recorded["inputs_in_order"]:
        builder.add_index(str(data / name))
    builder.finalize(str(tmp_path / "m.idx"))
    for suffix in ("bin", "idx"):
        content = (tmp_path / f"m.{suffix}").read_bytes()
        assert len(content) == recorded[f"size_{suffix}"]
        assert hashlib.sha256(content).hexdigest() == recorded[f"sha256_{suffix}"]


def test_merge_keeps_empty_documents_and_modes(data, tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), multimodal=True)
    for _ in range(2):
        builder.add_index(str(data / "mm"))
    builder.add_flat_documents(np.array([7, 8, 9]), np.array([2, 1]), np.array([0, 2]))
    builder.finalize(str(tmp_path / "m.idx"))
    merged, once = (
        IndexedDataset(str(tmp_path / "m"), multimodal=True),
        IndexedDataset(str(data / "mm"), True),
    )
    n = len(once)
    assert merged.sequence_modes.tolist() == once.sequence_modes.tolist() * 2 + [0, 0]
    shifted = (once.document_indices[1:] + n).tolist()
    assert merged.document_indices.tolist() == [*once.document_indices, *shifted, 2 * n, 2 * n + 2]


def test_dtype_rule_and_codes(data):
    rule = json.loads((data / "indexed_extra.json").read_text())["dtype_rule"]
    for size, name in rule.items():
        assert DType.optimal_dtype(None if size == "None" else int(size)) is getattr(np, name)
    codes = {
        1: np.uint8,
        2: np.int8,
        3: np.int16,
        4: np.int32,
        5: np.int64,
        6: np.float64,
        7: np.float32,
        8: np.uint16,
    }
    for code, dtype in codes.items():
        assert DType.dtype_from_code(code) is dtype
        assert DType.code_from_dtype(dtype) == code
        assert DType.size(code) == DType.size(dtype) == np.dtype(dtype).itemsize


def test_data_set_without_sequences(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "e.bin"))
    builder.finalize(str(tmp_path / "e.idx"))
    assert len(IndexedDataset(str(tmp_path / "e"))) == 0


def test_writing_needs_no_torch(repo_root):
    code = (
        "import sys; from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(repo_root)})


# ---- what can go wrong while reading


@pytest.fixture
def copy(data, tmp_path):
    """A copy of a golden pair that a test may spoil."""
    prefix = tmp_path / "x"
    for path in (get_bin_path, get_idx_path):
        Path(path(str(prefix))).write_bytes(Path(path(str(data / "multi"))).read_bytes())
    return prefix


def patch(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.mark.parametrize("missing,there", [("bin", "idx"), ("idx", "bin")])
def test_one_file_missing(copy, missing, there):
    os.unlink(f"{copy}.{missing}")
    with pytest.raises(DataError, match=rf"x\.{missing} is missing, although .*x\.{there} exists"):
        IndexedDataset(str(copy))


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_prefix_given_with_suffix(copy, suffix):
    with pytest.raises(DataError, match=rf"without \{suffix}: {copy}$"):
        IndexedDataset(str(copy) + suffix)


def test_prefix_without_its_ending(data):
    with pytest.raises(DataError, match=r"Did you mean .*/u16_text_document\?"):
        IndexedDataset(str(data / "u16"))


def test_no_such_directory(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        IndexedDataset(str(tmp_path / "nowhere" / "x"))


@pytest.mark.parametrize("kept", [0, 5, 20, 34, 200, 261])
def test_index_cut_short(copy, kept):
    os.truncate(f"{copy}.idx", kept)
    with pytest.raises(DataError, match=rf"x\.idx is cut short.*\b{kept}\b.*(Copy it again|run tools)"):
        IndexedDataset(str(copy))


def test_tokens_cut_short(copy):
    os.truncate(f"{copy}.bin", 100)
    with pytest.raises(DataError, match=r"x\.bin is cut short.* 112 bytes.* 100\."):
        IndexedDataset(str(copy))


def test_tokens_too_long_is_only_a_warning(copy, caplog):
    with open(f"{copy}.bin", "ab") as file:
        file.write(b"more")
    assert len(IndexedDataset(str(copy))) == 13
    assert "116 bytes" in caplog.text


@pytest.mark.parametrize(
    "offset,content,message",
    [
        (0, b"PK\x03\x04", "not an index file"),
        (9, struct.pack("<Q", 2), "format version 2; only version 1"),
        (17, b"\x09", "type code 9; known codes are 1 to 8"),
        (34 + 12 * 13 + 8 * 8, struct.pack("<q", 12), "documents end at sequence 12, but it has 13"),
    ],
)
def test_damaged_index(copy, offset, content, message):
    patch(f"{copy}.idx", offset, content)
    with pytest.raises(DataError, match=rf"x\.idx .*{message}"):
        IndexedDataset(str(copy))


def test_modes_asked_of_a_plain_file(copy):
    with pytest.raises(DataError, match="not a multimodal data set"):
        _IndexReader(f"{copy}.idx", multimodal=True)


def test_file_reader_notices_a_shrinking_file(copy):
    dataset = IndexedDataset(str(copy), mmap=False)
    os.truncate(f"{copy}.bin", 10)
    with pytest.raises(DataError, match="ends before byte 36"):
        dataset[3]


# ---- what can go wrong while writing


def test_nothing_under_the_final_names_until_finalize(copy, tmp_path):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    builder = IndexedDatasetBuilder(f"{copy}.bin", dtype=np.uint16)
    builder.add_document([1, 2, 3], [3])
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(os.listdir(tmp_path)) == 3
    builder.abandon()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("how", ["error", "collected", "exit"])
def test_temporary_files_are_removed(tmp_path, repo_root, how):
    if how == "error":
        with pytest.raises(KeyError), IndexedDatasetBuilder(str(tmp_path / "x.bin")) as builder:
            builder.add_item([1])
            raise KeyError
    elif how == "collected":
        builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"))
        del builder
    else:
        code = (
            "import sys; from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder as B\n"
            f"b = B({str(tmp_path / 'x.bin')!r}); b.add_item([1]); sys.exit(3)"
        )
        ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(repo_root)})
        assert ended.returncode == 3
    assert os.listdir(tmp_path) == []


def test_with_block_keeps_what_was_finalized(tmp_path):
    with IndexedDatasetBuilder(str(tmp_path / "x.bin")) as builder:
        builder.add_document([1, 2], [2])
        builder.finalize(str(tmp_path / "x.idx"))
    assert IndexedDataset(str(tmp_path / "x"))[0].tolist() == [1, 2]


@pytest.mark.parametrize("late", [False, True])
def test_disk_full(copy, tmp_path, late):
    """A file size limit stands for a full disk: at a write, or only when buffers are flushed at the end."""
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    builder = IndexedDatasetBuilder(f"{copy}.bin", dtype=np.uint16)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with (
            pytest.raises(DataError, match=r"cannot write .*x\.bin: File too large.*Nothing was written"),
            builder,
        ):
            builder.add_item(np.ones(5000 if late else 3_000_000, dtype=np.uint16))
            builder.finalize(f"{copy}.idx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_no_output_directory(tmp_path):
    with pytest.raises(
        DataError, match=r"cannot write .*nowhere/x\.bin: No such file.*Make .*nowhere a directory"
    ):
        IndexedDatasetBuilder(str(tmp_path / "nowhere" / "x.bin"))


@pytest.mark.parametrize("bad", [70000, -1])
def test_ids_do_not_wrap_around(tmp_path, bad):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=np.uint16)
    with pytest.raises(DataError, match=rf"token id {bad} does not fit uint16"):
        builder.add_item(np.array([5, bad]))


def test_lengths_must_cover_the_tokens(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"))
    with pytest.raises(ValueError, match="sum to 4, but 3"):
        builder.add_document([1, 2, 3], [2, 2])
    with pytest.raises(ValueError, match="sum to 2, but 3"):
        builder.add_flat_documents(np.arange(3), np.array([2]))
    with pytest.raises(ValueError, match="cover"):
        builder.add_flat_documents(np.arange(3), np.array([2, 1]), np.array([1]))


def test_merging_what_does_not_fit(data, copy, tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.uint16)
    with pytest.raises(DataError, match="int32 tokens and this data set uint16"):
        builder.add_index(str(data / "i32_text_document"))
    with pytest.raises(DataError, match="does not exist"):
        builder.add_index(str(tmp_path / "none"))
    os.truncate(f"{copy}.bin", 50)
    with pytest.raises(DataError, match="has 50 bytes, its index announces 112"):
        builder.add_index(str(copy))
