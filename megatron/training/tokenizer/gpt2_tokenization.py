"""GPT-2's tokenizer by its files, with the vocabulary maps in reach."""

import json
import logging
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.errors import DataError
from megatron.training.tokenizer.base import flatten, refuse_lone_surrogates
from megatron.training.tokenizer.byte_level import (
    build_byte_level_bpe,
    byte_to_character,
    character_to_byte,
    read_byte_level_files,
)
from megatron.training.tokenizer.fast_bpe import fast_bpe

logger = logging.getLogger(__name__)

PRETRAINED_VOCAB_ARCHIVE_MAP = {"gpt2": "https://s3.amazonaws.com/models.huggingface.co/bert/gpt2-vocab.json"}
PRETRAINED_MERGES_ARCHIVE_MAP = {
    "gpt2": "https://s3.amazonaws.com/models.huggingface.co/bert/gpt2-merges.txt"
}

VOCAB_NAMES = ("vocab.json", "gpt2-vocab.json")
MERGES_NAMES = ("merges.txt", "gpt2-merges.txt")
SPECIAL_TOKENS_NAME = "special_tokens.txt"


def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each of the 256 bytes in GPT-2's files."""
    return dict(byte_to_character())


def get_pairs(word: Sequence[str]) -> set[tuple[str, str]]:
    """The pairs of neighbours in ``word``."""
    return set(pairwise(word))


class GPT2Tokenizer:
    """Byte-level BPE from GPT-2's two files.

    Attributes:
        encoder: token to id.
        decoder: id to token.
        notice: why the fast path is not in use, in one line, or None.

    Args:
        vocab_file: JSON object of token to id.
        merges_file: one merge a line, most frequent first.
        errors: what ``decode`` does with bytes that are not UTF-8 (as for ``bytes.decode``).
        special_tokens: tokens that get ids after the vocabulary. ``encode`` does not look for them in the
        text. max_len: longest sequence a model takes, in tokens; longer ones are encoded all the same, with a
            warning from ``convert_tokens_to_ids``.
    """

    def __init__(
        self,
        vocab_file: str,
        merges_file: str,
        errors: str = "replace",
        special_tokens: list[str] | None = None,
        max_len: int | None = None,
    ) -> None:
        files = read_byte_level_files(vocab_file, merges_file)
        self.max_len = int(max_len) if max_len is not None else int(1e12)
        self.errors = errors
        self.encoder = files.vocabulary
        self.decoder = {index: token for token, index in self.encoder.items()}
        self._merges = files.merges
        self._bpe = build_byte_level_bpe(files)
        self._fast, self.notice = fast_bpe(self._bpe.to_str(), lambda text: self._encode(text).ids)
        self.special_tokens: dict[str, int] = {}
        self.special_tokens_decoder: dict[int, str] = {}
        self.set_special_tokens(special_tokens)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, cache_dir: str | None = None, *inputs: Any, **kwargs: Any
    ) -> "GPT2Tokenizer":
        """Build from a directory that holds the vocabulary and the merges. Nothing is ever downloaded.

        Raises:
            DataError: not a directory, or without the two files.
        """
        directory = Path(cache_dir or "", pretrained_model_name_or_path)
        found = [
            next((directory / name for name in names if (directory / name).is_file()), None)
            for names in (VOCAB_NAMES, MERGES_NAMES)
        ]
        if None in found:
            raise DataError(
                f"{pretrained_model_name_or_path}: no directory with {VOCAB_NAMES[0]} and {MERGES_NAMES[0]} "
                f"(or {VOCAB_NAMES[1]} and {MERGES_NAMES[1]}), and nothing is downloaded; give a "
                f"directory that "
                "holds both files"
            )
        specials = directory / SPECIAL_TOKENS_NAME
        if specials.is_file() and "special_tokens" not in kwargs:
            kwargs["special_tokens"] = specials.read_text(encoding="utf-8").split("\n")[:-1]
        return cls(str(found[0]), str(found[1]), *inputs, **kwargs)

    def __len__(self) -> int:
        return len(self.encoder) + len(self.special_tokens)

    def set_special_tokens(self, special_tokens: Iterable[str] | None) -> None:
        """Replace the special tokens: ids follow the vocabulary in the order given."""
        self.special_tokens = {
            token: len(self.encoder) + index for index, token in enumerate(special_tokens or ())
        }
        self.special_tokens_decoder = {index: token for token, index in self.special_tokens.items()}

    def bpe(self, token: str) -> str:
        """The pieces of one pre-split word, given in stand-in characters, with blanks between them."""
        return " ".join(piece.value for piece in self._bpe.model.tokenize(token))

    def tokenize(self, text: str) -> list[str]:
        """The tokens of ``text``, in stand-in characters."""
        return self._encode(text).tokens

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """Ids of tokens; of one token if a string is given. Unknown tokens get id 0."""
        if isinstance(tokens, str):
            return self.special_tokens.get(tokens, self.encoder.get(tokens, 0))
        ids = [self.special_tokens.get(token, self.encoder.get(token, 0)) for token in tokens]
        if len(ids) > self.max_len:
            logger.warning("a sequence of %d tokens is longer than the model's %d", len(ids), self.max_len)
        return ids

    def convert_ids_to_tokens(self, ids: Iterable[int], skip_special_tokens: bool = False) -> list[str]:
        """Tokens of ids. Raises DataError for an id outside the vocabulary."""
        tokens = []
        for index in ids:
            special = self.special_tokens_decoder.get(index)
            if special is None:
                tokens.append(self._token(index))
            elif not skip_special_tokens:
                tokens.append(special)
        return tokens

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; raises DataError for a lone surrogate."""
        return self._fast.encode(text) if self._fast else self._encode(text).ids

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end (int32) and the length of each (int64)."""
        return self._fast.encode_flat(texts) if self._fast else flatten([self.encode(text) for text in texts])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids. Raises DataError for an id outside the vocabulary."""
        to_byte = character_to_byte()
        text = "".join([self._token(index) for index in tokens])
        return bytes(to_byte[character] for character in text).decode("utf-8", errors=self.errors)

    def save_vocabulary(self, vocab_path: str) -> tuple[str, str, str]:
        """Write vocabulary, merges and special tokens to the directory; returns the three paths."""
        directory = Path(vocab_path)
        if not directory.is_dir():
            raise DataError(
                f"{vocab_path}: not a directory; make it first, the vocabulary is written into it"
            )
        vocab, merges = directory / VOCAB_NAMES[0], directory / MERGES_NAMES[0]
        specials = directory / SPECIAL_TOKENS_NAME
        vocab.write_text(json.dumps(self.encoder, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(f"{left} {right}" for left, right in self._merges)]
        merges.write_text("\n".join(lines) + "\n", encoding="utf-8")
        specials.write_text("".join(f"{token}\n" for token in self.special_tokens), encoding="utf-8")
        return str(vocab), str(merges), str(specials)

    def _encode(self, text: str) -> Any:
        try:
            return self._bpe.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            refuse_lone_surrogates([text])
            raise

    def _token(self, index: int) -> str:
        token = self.decoder.get(int(index))
        if token is None:
            raise DataError(f"token id {index} is outside the vocabulary of {len(self.encoder)} tokens")
        return token
