"""tools/preprocess_data.py and tools/merge_datasets.py, run as a user runs them: what comes out."""

import gzip
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "500"]


def run(tool, *words, env=None):
    command = [sys.executable, TOOLS / tool, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)


def preprocess(*words, env=None):
    done = run("preprocess_data.py", *words, env=env)
    assert done.returncode == 0, done.stderr
    return done


def read_pair(prefix):
    """The documents of a data set, each a list of sequences, by the layout of the format alone."""
    index = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, entries = struct.unpack_from("<9sQBQQ", index)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    lengths = np.frombuffer(index, "<i4", sequences, 34)
    offsets = np.frombuffer(index, "<i8", sequences, 34 + 4 * sequences)
    documents = np.frombuffer(index, "<i8", entries, 34 + 12 * sequences)
    assert len(index) == 34 + 12 * sequences + 8 * entries
    dtype = {8: "<u2", 4: "<i4"}[code]
    tokens = Path(f"{prefix}.bin").read_bytes()
    rows = [np.frombuffer(tokens, dtype, n, o).tolist() for n, o in zip(lengths, offsets, strict=True)]
    return [rows[a:b] for a, b in pairwise(documents)]


def same_files(prefix, expected):
    for suffix in (".bin", ".idx"):
        assert Path(f"{prefix}{suffix}").read_bytes() == Path(f"{expected}{suffix}").read_bytes(), suffix


GOLDEN = {
    "u16": ("data/u16", "corpus_u16", [*NULL, "--append-eod"]),
    "i32": (
        "data/i32",
        "corpus_i32",
        ["--tokenizer-type", "NullTokenizer", "--vocab-size", "70000", "--append-eod"],
    ),
    "no eod": ("data/b_noeod", "corpus_b", NULL),
    "round robin": ("data/part2rr", "corpus_b", [*NULL, "--append-eod", "--partitions", "2"]),
    "in order": (
        "data/part2seq",
        "corpus_b",
        [*NULL, "--append-eod", "--partitions", "2", "--keep-sequential-samples"],
    ),
}


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("case", GOLDEN)
def test_files_equal_the_golden_ones(golden, tmp_path, case, workers):
    expected, corpus, flags = GOLDEN[case]
    source = golden / "preprocess" / f"{corpus}.jsonl"
    preprocess("--input", source, "--output-prefix", tmp_path / "out", "--workers", workers, *flags)
    same_files(tmp_path / "out_text_document", golden / f"{expected}_text_document")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out_text_document.bin",
        "out_text_document.idx",
    ]


def test_split_sentences_equal_the_golden_files(golden, tmp_path):
    """Lists of strings are sentences, and empty documents stay."""
    here = golden / "preprocess"
    flags = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", here / "bert_vocab.txt"]
    preprocess(
        "--input", here / "corpus_sent.jsonl", "--output-prefix", tmp_path / "out", "--workers", 2, *flags
    )
    same_files(tmp_path / "out_text_document", here / "sent_text_document")


def as_gzip(data, path):
    path.write_bytes(gzip.compress(data))


def as_zstd(data, path):
    zstandard = pytest.importorskip("zstandard")
    half = data.index(b"\n", len(data) // 2) + 1
    frames = [zstandard.ZstdCompressor().compress(part) for part in (data[:half], data[half:])]
    path.write_bytes(b"".join(frames))


def as_array(data, path):
    path.write_text(json.dumps([json.loads(line) for line in data.splitlines()], indent=1))


def as_objects(data, path):
    path.write_text("\n".join(json.dumps(json.loads(line), indent=2) for line in data.splitlines()))


def as_parquet(data, path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([json.loads(line) for line in data.splitlines()])
    parquet.write_table(table, path, row_group_size=40)


CONTAINERS = {
    "in.jsonl": lambda data, path: path.write_bytes(data),
    "in.json": lambda data, path: path.write_bytes(data),
    "in.txt": lambda data, path: path.write_bytes(data),
    "mark.jsonl": lambda data, path: path.write_bytes(b"\xef\xbb\xbf" + data),
    "dos.jsonl": lambda data, path: path.write_bytes(data.replace(b"\n", b"\r\n")),
    "open_end.jsonl": lambda data, path: path.write_bytes(data.removesuffix(b"\n")),
    "in.jsonl.gz": as_gzip,
    "mark.json.gz": lambda data, path: as_gzip(b"\xef\xbb\xbf" + data, path),
    "in.jsonl.zst": as_zstd,
    "array.json": as_array,
    "objects.json": as_objects,
    "in.parquet": as_parquet,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_kind_of_input_gives_the_same_files(golden, tmp_path, name):
    corpus = (golden / "preprocess" / "corpus_b.jsonl").read_bytes()
    CONTAINERS[name](corpus, tmp_path / name)
    preprocess("--input", tmp_path / name, "--output-prefix", tmp_path / "out", "--workers", 2, *NULL)
    same_files(tmp_path / "out_text_document", golden / "data" / "b_noeod_text_document")


@pytest.mark.parametrize("how", ["pattern", "list"])
def test_several_files_are_read_in_order(golden, tmp_path, how):
    lines = (golden / "preprocess" / "corpus_b.jsonl").read_bytes().splitlines(keepends=True)
    parts = [tmp_path / f"part{number}.jsonl" for number in range(3)]
    for number, path in enumerate(parts):
        path.write_bytes(b"".join(lines[number * 30 : number * 30 + 30]))
    given = [tmp_path / "part*.jsonl"] if how == "pattern" else parts
    flags = [*NULL, "--append-eod", "--partitions", "2"]
    preprocess("--input", *given, "--output-prefix", tmp_path / "out", "--workers", 2, *flags)
    same_files(tmp_path / "out_text_document", golden / "data" / "part2rr_text_document")


def test_every_key_gets_both_files(golden, tmp_path):
    """The original wrote the index of the last key only."""
    source = golden / "preprocess" / "corpus_b.jsonl"
    preprocess(
        "--input",
        source,
        "--output-prefix",
        tmp_path / "two",
        "--json-keys",
        "text",
        "title",
        "--workers",
        2,
        *NULL,
    )
    sizes = json.loads((golden / "data" / "indexed_extra.json").read_text())["two_keys_file_sizes"]
    sizes["twokeys_text_document.idx"] = (golden / "data" / "b_noeod_text_document.idx").stat().st_size
    for name, size in sizes.items():
        assert (tmp_path / name.replace("twokeys", "two")).stat().st_size == size
    titles = [json.loads(line)["title"] for line in source.read_text().splitlines()]
    expected = [[[int(word) for word in title.split()]] for title in titles]
    assert read_pair(tmp_path / "two_title_document") == expected


def corpus_of_all_shapes(path):
    """Strings, lists, empty strings and lists, and enough text for many blocks; returns the values."""
    rng = np.random.default_rng(7)

    def words(count):
        return " ".join(map(str, rng.integers(0, 500, count)))

    values = []
    for number in range(4000):
        shape = number % 7
        values.append(
            ""
            if shape == 3
            else []
            if shape == 4
            else ["", words(5), ""]
            if shape == 5
            else [words(3), words(4)]
            if shape == 6
            else words(int(rng.integers(1, 60)))
        )
    path.write_text(
        "".join(json.dumps({"text": value, "n": index}) + "\n" for index, value in enumerate(values))
    )
    return values


def expected_documents(values, eod):
    documents = []
    for value in values:
        texts = value if isinstance(value, list) else [value]
        sequences = [[int(word) for word in text.split()] for text in texts if text]
        if sequences:
            sequences[-1].append(eod)
        documents.append(sequences)
    return documents


@pytest.mark.parametrize("flags", [[], ["--partitions", "3"]])
def test_result_is_equal_for_any_number_of_workers(tmp_path, flags):
    values = corpus_of_all_shapes(tmp_path / "in.jsonl")
    expected = expected_documents(values, 500)
    if flags:
        expected = [document for part in range(3) for document in expected[part::3]]
    digests = set()
    for workers in (3, 6) if flags else (1, 2, 5):
        prefix = tmp_path / f"w{workers}"
        preprocess(
            "--input",
            tmp_path / "in.jsonl",
            "--output-prefix",
            prefix,
            "--workers",
            workers,
            "--append-eod",
            *NULL,
            *flags,
        )
        assert read_pair(f"{prefix}_text_document") == expected
        index = Path(f"{prefix}_text_document.idx").read_bytes()
        digests.add(hashlib.sha256(index + Path(f"{prefix}_text_document.bin").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_a_record_larger_than_a_block_is_read_whole(tmp_path):
    long = " ".join(["7"] * 3_000_000)
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("1", long, "2 3"))
    )
    preprocess("--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "out", "--workers", 2, *NULL)
    assert read_pair(tmp_path / "out_text_document") == [[[1]], [[7] * 3_000_000], [[2, 3]]]


def test_printed_lines(golden, tmp_path):
    source = golden / "preprocess" / "corpus_u16.jsonl"
    done = preprocess(
        "--input", source, "--output-prefix", tmp_path / "out", "--workers", 2, "--log-interval", 60, *NULL
    )
    number = r"\d+\.\d+"
    pattern = rf"^Processed (\d+) documents \({number} docs/s, {number} MB/s\)\."
    found = re.findall(pattern, done.stderr, re.MULTILINE)
    assert found == ["60", "120", "180"]
    assert f"Opening {source}\n" in done.stdout
    assert re.search(rf"^Time to startup: {number}", done.stdout, re.MULTILINE)


def test_flags_of_ascend_forks_and_abbreviations_are_accepted(golden, tmp_path):
    here = golden / "preprocess"
    done = preprocess(
        "--inp",
        here / "corpus_sent.jsonl",
        "--output-pre",
        tmp_path / "out",
        "--handler-name",
        "GeneralPretrainHandler",
        "--dataset-impl",
        "mmap",
        "--vocab-extra-ids",
        7,
        "--chunk-size",
        "32",
        "--vocab",
        here / "bert_vocab.txt",
        "--tokenizer-type",
        "BertWordPieceLowerCase",
    )
    same_files(tmp_path / "out_text_document", here / "sent_text_document")
    assert "--chunk-size 32 has no effect" in done.stderr and "--vocab-extra-ids 7 has no" in done.stderr


def test_hugging_face_directory_with_modellink_flags(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    words = {word: index for index, word in enumerate(["<eos>", "a", "b", "c"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / "hf").mkdir()
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "in.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n')
    preprocess(
        "--input",
        tmp_path / "in.jsonl",
        "--output-prefix",
        tmp_path / "out",
        "--append-eod",
        "--tokenizer-type",
        "PretrainedFromHF",
        "--tokenizer-name-or-path",
        tmp_path / "hf",
    )
    assert read_pair(tmp_path / "out_text_document") == [[[1, 2, 0]], [[3, 0]]]


@pytest.fixture
def punkt(tmp_path, monkeypatch):
    """A punkt model that knows one abbreviation and nothing else."""
    pytest.importorskip("nltk")
    model = tmp_path / "nltk" / "tokenizers" / "punkt_tab" / "english"
    model.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (model / name).write_text("")
    (model / "abbrev_types.txt").write_text("dr\n")
    monkeypatch.setenv("NLTK_DATA", str(tmp_path / "nltk"))


@pytest.mark.parametrize("flags", [[], ["--keep-newlines"]])
def test_sentences_are_split_by_the_punkt_model(punkt, tmp_path, flags):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "dr", "who", "came", ".", "he", "left", "yes"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    texts = ["Dr. Who came.\nHe left.", ["Yes."], ""]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    preprocess(
        "--input",
        tmp_path / "in.jsonl",
        "--output-prefix",
        tmp_path / "out",
        "--split-sentences",
        "--workers",
        2,
        "--tokenizer-type",
        "BertWordPieceLowerCase",
        "--vocab-file",
        tmp_path / "vocab.txt",
        *flags,
    )
    assert read_pair(tmp_path / "out_text_sentence") == [[[5, 8, 6, 7, 8], [9, 10, 8]], [[11, 8]], []]


def test_a_new_run_replaces_the_old_files(golden, tmp_path):
    source = golden / "preprocess" / "corpus_b.jsonl"
    for suffix in (".bin", ".idx"):
        (tmp_path / f"out_text_document{suffix}").write_bytes(b"old")
    preprocess("--input", source, "--output-prefix", tmp_path / "out", "--workers", 1, *NULL)
    same_files(tmp_path / "out_text_document", golden / "data" / "b_noeod_text_document")
    assert len(list(tmp_path.iterdir())) == 2


def test_help_is_complete():
    done = run("preprocess_data.py", "--help")
    flags = """--input --json-keys --split-sentences --keep-newlines --append-eod --lang --output-prefix
        --workers --partitions --log-interval --keep-sequential-samples --tokenizer-type --tokenizer-model
        --vocab-file --vocab-size --merge-file --vocab-extra-ids --tiktoken-pattern
        --tiktoken-num-special-tokens --tiktoken-special-tokens --tokenizer-name-or-path --handler-name
        --dataset-impl --chunk-size --vocab"""
    assert done.returncode == 0
    assert [flag for flag in flags.split() if flag not in done.stdout] == []


@pytest.fixture
def pairs(golden, tmp_path):
    """A directory with the data sets of the golden merge."""
    directory = tmp_path / "pairs"
    directory.mkdir()
    for name in ("u16", "part2rr"):
        for suffix in (".bin", ".idx"):
            shutil.copy(golden / "data" / f"{name}_text_document{suffix}", directory)
    return directory


def test_merge_gives_the_golden_files(golden, tmp_path, pairs):
    done = run("merge_datasets.py", "--input", pairs, "--output-prefix", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    figures = json.loads((golden / "data" / "indexed_extra.json").read_text())["merge"]
    for suffix in ("bin", "idx"):
        data = (tmp_path / f"merged.{suffix}").read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (
            figures[f"size_{suffix}"],
            figures[f"sha256_{suffix}"],
        )


def test_merge_keeps_modes(golden, tmp_path):
    (tmp_path / "mm").mkdir()
    for name in ("a", "b"):
        for suffix in (".bin", ".idx"):
            shutil.copy(golden / "data" / f"mm{suffix}", tmp_path / "mm" / f"{name}{suffix}")
    done = run(
        "merge_datasets.py", "--input", tmp_path / "mm", "--output-prefix", tmp_path / "out", "--multimodal"
    )
    assert done.returncode == 0, done.stderr
    documents = json.loads((golden / "data" / "indexed_extra.json").read_text())["mm"] * 2
    modes = [mode for document in documents for mode in document["modes"]]
    tokens = [token for document in documents for token in document["tokens"]]
    assert np.frombuffer((tmp_path / "out.idx").read_bytes()[-len(modes) :], np.int8).tolist() == modes
    assert np.fromfile(tmp_path / "out.bin", "<i4").tolist() == tokens


def damage_by_removing(pairs, golden):
    (pairs / "u16_text_document.idx").unlink()


def damage_by_adding(pairs, golden):
    (pairs / "notes.txt").write_text("x")


def damage_by_dtype(pairs, golden):
    for suffix in (".bin", ".idx"):
        shutil.copy(golden / "data" / f"i32_text_document{suffix}", pairs)


def damage_by_cutting(pairs, golden):
    path = pairs / "u16_text_document.bin"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-2])


def damage_by_emptying(pairs, golden):
    for path in pairs.iterdir():
        path.unlink()


DAMAGES = {
    damage_by_removing: "u16_text_document.idx is missing",
    damage_by_adding: "notes.txt is neither .bin nor .idx",
    damage_by_dtype: "holds uint16 but",
    damage_by_cutting: "u16_text_document.bin",
    damage_by_emptying: "no .bin/.idx pair",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_merge_refuses_unfit_directories(golden, tmp_path, pairs, damage):
    damage(pairs, golden)
    done = run("merge_datasets.py", "--input", pairs, "--output-prefix", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and DAMAGES[damage] in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]
