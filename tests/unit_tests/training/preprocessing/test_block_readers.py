"""Blocks hold whole records, in order, wherever the cuts fall."""

import gzip
import json

import numpy as np
import pytest

from megatron.core.errors import DataError
from megatron.training.preprocessing.inputs import find_inputs
from megatron.training.preprocessing.readers import Block, FileRange, LineBytes, open_source
from megatron.training.preprocessing.records import values_of


def blocks_of(path, block_bytes, keys=("text",)):
    (file,) = find_inputs([str(path)])
    return list(open_source(0, file, list(keys), block_bytes).blocks)


def texts_of(blocks):
    return [text for block in blocks for text in values_of(block, ["text"])[0]]


def lines_of(texts):
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(1)
    return ["é" * int(size) for size in rng.integers(0, 40, 300)]


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("block_bytes", [1, 13, 14, 15, 100, 1000, 10**6])
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_blocks_hold_whole_records_for_every_block_size(tmp_path, texts, name, block_bytes, end):
    data = lines_of(texts).removesuffix(b"\n") + end
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    blocks = blocks_of(tmp_path / name, block_bytes)
    assert texts_of(blocks) == texts
    ends = [block.end for block in blocks]
    assert ends == sorted(ends) and ends[-1] == (tmp_path / name).stat().st_size


def test_ranges_cover_a_plain_file_without_gap(tmp_path, texts):
    data = lines_of(texts)
    (tmp_path / "a.jsonl").write_bytes(data)
    parts = [block.payload for block in blocks_of(tmp_path / "a.jsonl", 500)]
    assert len(parts) > 10
    assert [part.offset for part in parts[1:]] == [part.offset + part.length for part in parts[:-1]]
    assert all(data[part.offset + part.length - 1 :][:1] == b"\n" for part in parts)
    assert max(part.length for part in parts) < 500 + max(map(len, data.splitlines())) + 2


def test_a_line_longer_than_the_probe_is_one_block(tmp_path):
    texts = ["a" * 300_000, "b", "c" * 200_000]
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts))
    assert texts_of(blocks_of(tmp_path / "a.jsonl", 1000)) == texts


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("count", [1, 3, 300])
def test_arrays_and_sequences_of_objects_become_lines(tmp_path, texts, indent, count):
    records = [{"n": [1, {"a": ']}\\"\n'}], "text": text} for text in texts[:count]]
    (tmp_path / "array.json").write_text(json.dumps(records, indent=indent), encoding="utf-8")
    (tmp_path / "run.json").write_text(
        " \n".join(json.dumps(record, indent=indent) for record in records) + "\n\n"
    )
    assert texts_of(blocks_of(tmp_path / "array.json", 2000)) == texts[:count]
    if indent is not None:  # else it is JSON lines, where the last, blank line is an error
        assert texts_of(blocks_of(tmp_path / "run.json", 2000)) == texts[:count]


def test_an_array_with_characters_across_chunks_is_read_whole(tmp_path):
    texts = ["é" * 700_001, "x", "\u20ac" * 500_000]
    (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], ensure_ascii=False))
    assert texts_of(blocks_of(tmp_path / "a.json", 1000)) == texts


def test_a_json_file_with_a_broken_first_line_is_not_taken_for_lines(tmp_path):
    (tmp_path / "a.json").write_bytes(b'{"text": "1"\n{"text": "2"}\n')
    with pytest.raises(DataError, match=r"element 1 \(line 2\).*invalid JSON"):
        blocks_of(tmp_path / "a.json", 1000)


@pytest.mark.parametrize(("row_group", "block_bytes"), [(7, 50), (300, 50), (300, 10**6)])
def test_parquet_blocks_hold_whole_rows(tmp_path, texts, row_group, block_bytes):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    nested = [None if len(text) % 3 else {"a": [1]} for text in texts]
    for name, values in {"plain": texts, "dictionary": pyarrow.array(texts).dictionary_encode()}.items():
        table = pyarrow.table({"other": nested, "text": values})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=row_group)
        blocks = blocks_of(tmp_path / f"{name}.parquet", block_bytes)
        assert texts_of(blocks) == texts
        assert blocks[-1].end == (tmp_path / f"{name}.parquet").stat().st_size


def test_parquet_gives_lists_of_sentences_and_several_keys(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"b": [["x", "y"], []], "a": ["1", "2"]}), tmp_path / "a.parquet")
    (block,) = blocks_of(tmp_path / "a.parquet", 1000, keys=("a", "b"))
    assert values_of(block, ["a", "b"]) == [["1", "2"], [["x", "y"], []]]


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    with pytest.raises(DataError, match="became shorter"):
        values_of(Block(0, FileRange(str(tmp_path / "a.jsonl"), 0, 10), 10), ["text"])


def test_patterns_are_sorted_and_existing_names_are_not_patterns(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "a[1].jsonl"):
        (tmp_path / name).write_bytes(b"x")
    found = find_inputs([str(tmp_path / "a[1].jsonl"), str(tmp_path / "?.jsonl")])
    assert [file.path.rsplit("/", 1)[1] for file in found] == ["a[1].jsonl", "a.jsonl", "b.jsonl"]


def test_records_are_equal_without_the_fast_parser(monkeypatch):
    """The standard library alone gives the same values and the same errors."""
    from megatron.training.preprocessing import records

    def missing(line):
        raise ValueError("no fast parser")

    lines = [
        b'{"text": "a", "t": ["b"]}',
        rb'{"text": "\ud83d\ude00", "t": "c"}',
        b'{"text": "d", "t": [], "x": NaN}',
    ]
    block = Block(0, LineBytes(b"\n".join(lines) + b"\n"), 0)
    expected = [["a", "\U0001f600", "d"], [["b"], "c", []]]
    assert values_of(block, ["text", "t"]) == expected
    monkeypatch.setattr(records, "_fast_loads", missing)
    assert values_of(block, ["text", "t"]) == expected
    for bad in (b'{"text": 1}', b'{"text": "\\ud800"}', b"{}", b'{"text": "\xff"}'):
        with pytest.raises(records.RecordError) as caught:
            values_of(Block(0, LineBytes(b'{"text": "a"}\n' + bad), 0), ["text"])
        assert caught.value.index == 1


def test_gzip_files_of_several_members_are_read_whole(tmp_path, texts):
    members = [gzip.compress(lines_of(part)) for part in (texts[:90], texts[90:91], texts[91:])]
    (tmp_path / "a.gz").write_bytes(b"".join(members))
    assert texts_of(blocks_of(tmp_path / "a.gz", 700)) == texts
