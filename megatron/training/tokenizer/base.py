"""Parts that all tokenizers share: batches as flat arrays, checked files, and optional libraries."""

import importlib
import json
import os
from abc import ABC
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.errors import ConfigError, DataError


class BatchTokenizer(MegatronTokenizer, ABC):
    """A tokenizer that can turn many texts into one flat array of ids.

    A subclass with a faster way to a batch overrides ``tokenize_flat`` or ``tokenize_batch``.
    """

    notice: str | None = None
    """One line for the user about how the tokenizer was built, printed once by ``build_tokenizer``."""

    def tokenize_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """One sequence of ids for each text."""
        return [self.tokenize(text) for text in texts]

    def tokenize_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end, without a Python object per id.

        Args:
            texts: the documents; an empty one has length 0 unless the tokenizer adds special tokens.

        Returns:
            ids (int32, [sum of lengths]) and lengths (int64, [len(texts)]).

        Raises:
            DataError: a text holds half of a surrogate pair, which no file can hold as UTF-8.
        """
        return flatten(self.tokenize_batch(texts))


def flatten(batch: Sequence[Sequence[int] | np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids end to end (int32) and the length of each sequence (int64)."""
    lengths = np.fromiter((len(ids) for ids in batch), dtype=np.int64, count=len(batch))
    flat = np.empty(int(lengths.sum()), dtype=np.int32)
    end = 0
    for ids in batch:
        start, end = end, end + len(ids)
        flat[start:end] = ids
    return flat, lengths


def refuse_lone_surrogates(texts: Sequence[str]) -> None:
    """Raise DataError for the first text that is not encodable as UTF-8; otherwise do nothing."""
    for index, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            where = f"text {index} of {len(texts)}" if len(texts) > 1 else "the text"
            raise DataError(
                f"cannot tokenize {where}: character {error.start} is the lone surrogate "
                f"U+{ord(text[error.start]):04X}, half of a pair that UTF-8 cannot hold; "
                r"drop it or write the whole pair (such as \ud83d\ude00) where the text was made"
            ) from None


Value = TypeVar("Value")


def required(value: Value | None, flag: str, tokenizer: str, example: str = "FILE") -> Value:
    """The value of a flag that ``tokenizer`` cannot do without; ``example`` shows one in the message.

    Raises:
        ConfigError: the flag was not given.
    """
    if value is None:
        raise ConfigError(
            f"--tokenizer-type {tokenizer} needs {flag}, which was not given; add {flag} {example}"
        )
    return value


def existing_file(path: str, flag: str, what: str) -> Path:
    """``path`` as a non-empty regular file.

    Args:
        flag: the flag the path came from, for the message.
        what: the kind of file expected ("the GPT-2 vocabulary").

    Raises:
        DataError: nothing there, a directory, unreadable or empty.
    """
    file = Path(path)
    advice = f"give {what} with {flag}"
    if file.is_dir():
        raise DataError(f"{flag} {path}: this is a directory, not a file; {advice}")
    if not file.exists():
        raise DataError(f"{flag} {path}: no such file; {advice}")
    try:
        with file.open("rb") as stream:
            first = stream.read(1)
    except OSError as error:
        raise DataError(f"{flag} {path}: cannot be read ({error.strerror}); {advice}") from error
    if not first:
        raise DataError(f"{flag} {path}: the file is empty; {advice}")
    return file


def read_text(file: Path, flag: str, what: str) -> str:
    """The file's text. Raises DataError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{flag} {file}: byte {error.start} is not UTF-8 text; give {what} with {flag}"
        ) from error


def read_json(file: Path, flag: str, what: str) -> Any:
    """The file's JSON value. Raises DataError if it is not JSON."""
    text = read_text(file, flag, what)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{flag} {file}: not JSON (line {error.lineno}, column {error.colno}: {error.msg}); "
            f"give {what} with {flag}"
        ) from error
    except RecursionError:
        raise DataError(f"{flag} {file}: JSON nested too deep for {what}") from None


def lone_sentence_piece_model(source: str) -> str | None:
    """The SentencePiece model, if ``source`` is one or a directory that holds no other tokenizer files."""
    path = Path(source)
    if path.is_dir() and not any(
        (path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        path = path / "tokenizer.model"
    elif path.suffix == ".model" and path.with_name("tokenizer_config.json").is_file():
        return None
    return str(path) if path.suffix == ".model" and path.is_file() else None


def need(module: str, asked_by: str, package: str | None = None) -> ModuleType:
    """Import ``module``, or raise an error that says which ``package`` to install for ``asked_by``.

    Raises:
        ConfigError: the package is not installed, or does not import here.
    """
    package = package or module.split(".", maxsplit=1)[0]
    # One thread in each process: preprocessing and data loading start one process per core themselves, and a
    # thread pool does not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{asked_by} needs the Python package {package!r}, which does not import here ({error}); "
            f"install it: pip install {package}"
        ) from error
