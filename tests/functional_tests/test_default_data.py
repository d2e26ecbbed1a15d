"""The default corpus: same files everywhere, made once, whole or not at all."""

import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megatron.core.errors import ConfigError, DataError
from megatron.training.default_data import recipe
from megatron.training.default_data.corpus import (
    END_OF_DOCUMENT,
    MAX_CORPUS_BYTES,
    corpus_texts,
    library_modules,
    standard_library,
    train_vocabulary,
    write_corpus,
)
from megatron.training.default_data.recipe import MANIFEST, build_once, is_complete

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A small standard library: sources to take, and everything that must be left out."""
    root = tmp_path / "library"
    for name in ("json/decoder.py", "json/encoder.py", "textwrap.py", "shlex.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes((standard_library() / name).read_bytes())
    (root / "old.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9t\xe9'\n")
    (root / "broken.py").write_bytes(b"name = '\xe9'\n")
    for name in (
        "test/a.py",
        "json/tests/b.py",
        "site-packages/c.py",
        "encodings/d.py",
        "_sysconfigdata_x.py",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("unwanted = 1\n")
    (root / "empty.py").touch()
    return root


def test_corpus_size_is_within_its_limits() -> None:
    modules = library_modules(standard_library())
    assert 3_000_000 < sum(size for _, size in modules) <= MAX_CORPUS_BYTES
    assert modules == library_modules(standard_library())
    assert not any(name.startswith(("test/", "site-packages/", "encodings/")) for name, _ in modules)


def test_the_corpus_holds_the_sources_and_nothing_else(library: Path, tmp_path: Path) -> None:
    modules = library_modules(library)
    names = {"json/decoder.py", "json/encoder.py", "textwrap.py", "shlex.py", "old.py", "broken.py"}
    assert {name for name, _ in modules} == names
    corpus = tmp_path / "corpus.jsonl"
    assert write_corpus(library, modules, corpus) == len(names) - 1
    texts = {row["module"]: row["text"] for row in map(json.loads, corpus.read_text("utf-8").splitlines())}
    assert texts["textwrap.py"] == (standard_library() / "textwrap.py").read_text("utf-8")
    assert "été" in texts["old.py"]
    assert "broken.py" not in texts


def test_an_interpreter_without_sources_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="DATA_PATH="):
        library_modules(tmp_path)


def test_vocabulary_has_gpt2_format_and_encodes_any_text(library: Path, tmp_path: Path) -> None:
    from transformers import GPT2Tokenizer

    corpus = tmp_path / "corpus.jsonl"
    write_corpus(library, library_modules(library), corpus)
    assert train_vocabulary(corpus_texts(corpus), tmp_path, 400) == 400
    first = [(tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")]
    train_vocabulary(corpus_texts(corpus), tmp_path, 400)
    assert first == [(tmp_path / name).read_bytes() for name in ("vocab.json", "merges.txt")]
    assert END_OF_DOCUMENT in json.loads(first[0])
    assert sorted(json.loads(first[0]).values()) == list(range(400))
    peer = GPT2Tokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return 'ünï \U0001f40d'\n"
    ids = peer.encode(text)
    assert peer.decode(ids) == text
    assert len(ids) < len(text.encode())


def counted_build(directory: Path, log: Path) -> None:
    """Build slowly, and leave one mark in ``log`` for each time it happens."""

    def build(target: Path) -> None:
        with log.open("a") as marks:
            marks.write("built\n")
        (target / "part1").write_text("1")
        time.sleep(0.3)
        (target / "part2").write_text("22")

    build_once(directory, build, lambda line: None)
    assert (directory / "part2").read_text() == "22"


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "set", tmp_path / "log")
    workers = [context.Process(target=counted_build, args=arguments) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "killed while building"])
def test_an_incomplete_data_set_is_made_again(tmp_path: Path, damage: str) -> None:
    directory, log = tmp_path / "set", tmp_path / "log"
    counted_build(directory, log)
    if damage == "truncated":
        (directory / "part2").write_text("2")
    elif damage == "missing":
        (directory / "part1").unlink()
    elif damage == "no manifest":
        (directory / MANIFEST).unlink()
    else:
        directory.rename(tmp_path / "set.unfinished")
    assert not is_complete(directory)
    counted_build(directory, log)
    assert is_complete(directory)
    assert log.read_text() == "built\n" * 2
    assert not (tmp_path / "set.unfinished").exists()


def test_a_failing_build_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    def build(target: Path) -> None:
        (target / "part1").write_text("1")
        raise DataError("no")

    with pytest.raises(DataError):
        build_once(tmp_path / "set", build, lambda line: None)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MEGATRON_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/megatron-npu"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/megatron-npu"),
    ],
)
def test_cache_directory_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict, expected: str
) -> None:
    for name in ("MEGATRON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert recipe.cache_root() == Path(expected)


def test_an_unwritable_cache_names_the_variable(tmp_path: Path, library: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="MEGATRON_CACHE"):
        recipe.ensure_default_data(tmp_path / "file", library)


def test_sources_become_a_data_set(tmp_path: Path, library: Path, capfd: pytest.CaptureFixture) -> None:
    data = recipe.ensure_default_data(tmp_path / "cache dir", library)
    vocabulary = json.loads(data.vocab_file.read_text())
    tokens = np.fromfile(f"{data.data_path}.bin", dtype=np.uint16)
    assert (tokens == vocabulary[END_OF_DOCUMENT]).sum() == len(
        (data.directory / "corpus.jsonl").read_text("utf-8").splitlines()
    )
    spelling = {number: piece for piece, number in vocabulary.items()}
    assert "def" in "".join(spelling[number] for number in tokens.tolist())
    assert "[3/3]" in capfd.readouterr().err
    recipe.ensure_default_data(tmp_path / "cache dir", library)
    assert capfd.readouterr().err == ""


def test_the_command_prints_shell_assignments(tmp_path: Path, library: Path) -> None:
    """The command finds a finished set, named as the running interpreter would name it."""
    modules = library_modules(standard_library())
    name = recipe._cache_key(modules)
    directory = tmp_path / "it's a cache" / "default-data" / name
    build_once(directory, lambda target: None, print)
    shown = subprocess.run(
        [
            sys.executable,
            "-m",
            "megatron.training.default_data",
            "--cache-dir",
            str(tmp_path / "it's a cache"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    values = dict(shlex.split(line)[0].split("=", 1) for line in shown.stdout.splitlines())
    assert values == {
        "DATA_PATH": str(directory / "corpus_text_document"),
        "VOCAB_FILE": str(directory / "vocab.json"),
        "MERGE_FILE": str(directory / "merges.txt"),
    }
