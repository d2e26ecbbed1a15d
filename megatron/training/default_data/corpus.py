"""The default corpus, one JSON line per module of Python's standard library, and a vocabulary for it."""

import hashlib
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron.core.errors import DataError

MAX_CORPUS_BYTES = 14_000_000

# Test suites repeat themselves, and code pages are tables of numbers: a small model learns little from them.
SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "_bundled"}
)
# Written by the build of this interpreter: full of paths of the machine that compiled it.
SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")


def standard_library() -> Path:
    """Directory of the pure-Python standard library of this interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def library_modules(library: Path) -> list[tuple[str, int]]:
    """The modules of the corpus, as (path relative to ``library``, size in bytes), in corpus order.

    The order is that of the hashes of the paths: the same everywhere, and well mixed, so that the last
    documents, which become the validation set, are like the first.

    Raises:
        DataError: there are no sources (an interpreter that ships compiled files only).
    """
    modules = sorted(_sources(library), key=lambda module: hashlib.sha256(module[0].encode()).digest())
    chosen, total = [], 0
    for name, size in modules:
        if size and total + size <= MAX_CORPUS_BYTES:
            chosen.append((name, size))
            total += size
    if not chosen:
        raise DataError(
            f"the default corpus is made of the Python sources under {library}, and there are none. "
            "Give a data set of your own: DATA_PATH=PREFIX VOCAB_FILE=... MERGE_FILE=..."
        )
    return chosen


def _sources(library: Path) -> Iterator[tuple[str, int]]:
    for directory, subdirectories, files in os.walk(library):
        # Pruned in place, so that a site-packages of many thousand files is never entered.
        subdirectories[:] = set(subdirectories) - SKIPPED_DIRECTORIES
        for name in files:
            path = Path(directory, name)
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES) and path.is_file():
                yield path.relative_to(library).as_posix(), path.stat().st_size


def write_corpus(library: Path, modules: list[tuple[str, int]], target: Path) -> int:
    """Write ``{"text": source, "module": path}`` lines to ``target``; returns the number of lines.

    A file that is not valid in its own declared encoding is left out.
    """
    lines = 0
    with target.open("w", encoding="utf-8") as out:
        for name, _ in modules:
            try:
                with tokenize.open(library / name) as source:
                    text = source.read()
            except (SyntaxError, UnicodeDecodeError):
                continue
            out.write(json.dumps({"text": text, "module": name}, ensure_ascii=False) + "\n")
            lines += 1
    return lines


def corpus_texts(corpus: Path) -> Iterator[str]:
    """The texts of a corpus written by :func:`write_corpus`."""
    with corpus.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


VOCABULARY_SIZE = 4096
END_OF_DOCUMENT = "<|endoftext|>"


def train_vocabulary(texts: Iterable[str], directory: Path, size: int = VOCABULARY_SIZE) -> int:
    """Write ``vocab.json`` and ``merges.txt`` to ``directory``; returns the number of tokens.

    The 256 bytes and the end-of-document token are always in, so any text has ids.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.model.save(str(directory))
    return tokenizer.get_vocab_size()
