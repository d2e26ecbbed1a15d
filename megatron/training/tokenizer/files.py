"""Reading tokenizer files, with errors that name the file, the cause and the remedy."""

import json
from pathlib import Path
from typing import Any, TypeVar

from megatron.core.errors import ConfigError, DataError

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
    """The SentencePiece model, if ``source`` is one, or a directory with one and nothing that "
    "describes it."""
    path = Path(source)
    if path.is_dir() and not any(
        (path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")
    ):
        path = path / "tokenizer.model"
    elif path.suffix == ".model" and path.with_name("tokenizer_config.json").is_file():
        return None
    return str(path) if path.suffix == ".model" and path.is_file() else None
