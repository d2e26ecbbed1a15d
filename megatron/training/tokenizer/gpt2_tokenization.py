"""GPT-2's byte-level BPE: its two files, ``GPT2Tokenizer``, and the tokenizer type GPT2BPETokenizer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron.core.errors import DataError
from megatron.training.tokenizer.base import (
    BatchTokenizer,
    existing_file,
    flatten,
    need,
    read_json,
    read_text,
    refuse_lone_surrogates,
)
from megatron.training.tokenizer.fast_bpe import fast_bpe

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

PRETRAINED_VOCAB_ARCHIVE_MAP = {"gpt2": "https://s3.amazonaws.com/models.huggingface.co/bert/gpt2-vocab.json"}
PRETRAINED_MERGES_ARCHIVE_MAP = {
    "gpt2": "https://s3.amazonaws.com/models.huggingface.co/bert/gpt2-merges.txt"
}

VOCAB_NAMES = ("vocab.json", "gpt2-vocab.json")
MERGES_NAMES = ("merges.txt", "gpt2-merges.txt")
SPECIAL_TOKENS_NAME = "special_tokens.txt"


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
        special_tokens: tokens that get ids after the vocabulary. ``encode`` does not look for them in texts.
        max_len: longest sequence a model takes, in tokens; longer ones are encoded all the same, with a
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
    ) -> GPT2Tokenizer:
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
                f"(or {VOCAB_NAMES[1]} and {MERGES_NAMES[1]}), and nothing is downloaded; give a directory "
                "that holds both files"
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
        """The pieces of one pre-split word, given in printable characters, with blanks between them."""
        return " ".join(piece.value for piece in self._bpe.model.tokenize(token))

    def tokenize(self, text: str) -> list[str]:
        """The tokens of ``text``, in printable characters."""
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


VOCABULARY = "the JSON object of tokens and ids that belongs to the merges (GPT-2's is gpt2-vocab.json)"
MERGES = "the list of merges that belongs to the vocabulary (GPT-2's is gpt2-merges.txt)"


@dataclass(frozen=True)
class ByteLevelFiles:
    """Content of a vocabulary file and a merges file of one tokenizer."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]


@cache
def byte_to_character() -> dict[int, str]:
    """GPT-2's printable character for each byte.

    Bytes that are visible characters of Latin-1 stand for themselves; the others, in order, are U+0100 and
    up.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in sorted(visible)} | {
        byte: chr(0x100 + index) for index, byte in enumerate(hidden)
    }


@cache
def character_to_byte() -> dict[str, int]:
    """The inverse of ``byte_to_character``."""
    return {character: byte for byte, character in byte_to_character().items()}


def read_byte_level_files(vocab_file: str, merge_file: str) -> ByteLevelFiles:
    """Read and check both files.

    Raises:
        DataError: a file is missing, empty, malformed, or they do not belong together.
    """
    vocabulary = _read_vocabulary(vocab_file)
    merges = _read_merges(merge_file)
    for rank, (left, right) in enumerate(merges):
        missing = next((piece for piece in (left, right, left + right) if piece not in vocabulary), None)
        if missing is not None:
            raise DataError(
                f"--merge-file {merge_file} does not belong to --vocab-file {vocab_file}: merge {rank + 1}, "
                f"{left!r} + {right!r}, needs the token {missing!r}, which the vocabulary lacks; "
                "give a pair of files from one tokenizer"
            )
    return ByteLevelFiles(vocabulary, merges)


def build_byte_level_bpe(files: ByteLevelFiles) -> tokenizers.Tokenizer:
    """GPT-2's pipeline on ``tokenizers``: no normalisation, its split expression, bytes, BPE.

    No token is special: the text ``<|endoftext|>`` is split like any other text.
    """
    library = need("tokenizers", "byte-level BPE")
    tokenizer = library.Tokenizer(library.models.BPE(vocab=files.vocabulary, merges=files.merges))
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = library.decoders.ByteLevel()
    return tokenizer


def _read_vocabulary(vocab_file: str) -> dict[str, int]:
    file = existing_file(vocab_file, "--vocab-file", VOCABULARY)
    vocabulary = read_json(file, "--vocab-file", VOCABULARY)
    if not isinstance(vocabulary, dict) or not all(type(value) is int for value in vocabulary.values()):
        raise DataError(
            f"--vocab-file {vocab_file}: not one JSON object of token to id, as GPT-2 BPE needs; "
            f"give {VOCABULARY}, or use --tokenizer-type HuggingFaceTokenizer --tokenizer-model for a "
            "tokenizer.json"
        )
    lacking = [byte for byte, character in byte_to_character().items() if character not in vocabulary]
    # Bytes that UTF-8 never uses may be missing: no text can ask for them.
    lacking = [byte for byte in lacking if byte not in (0xC0, 0xC1) and byte < 0xF5]
    if lacking:
        raise DataError(
            f"--vocab-file {vocab_file}: not a byte-level vocabulary, {len(lacking)} of the 256 bytes have "
            f"no token (the first is 0x{lacking[0]:02X}), so some texts would lose characters; "
            f"give {VOCABULARY}"
        )
    return vocabulary


def _read_merges(merge_file: str) -> list[tuple[str, str]]:
    file = existing_file(merge_file, "--merge-file", MERGES)
    # Not splitlines(): tokens may hold characters such as U+0085 that it takes for line ends.
    lines = read_text(file, "--merge-file", MERGES).split("\n")
    merges = []
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pieces = line.split(" ")
        if len(pieces) != 2 or not all(pieces):
            raise DataError(
                f"--merge-file {merge_file}: line {number} is {line[:40]!r}, not two tokens with a blank "
                f"between them; give {MERGES}"
            )
        merges.append((pieces[0], pieces[1]))
    return merges


END_OF_TEXT = "<|endoftext|>"


class _GPT2BPETokenizer(BatchTokenizer):
    """GPT-2's byte-level BPE; ``eod`` is the token ``<|endoftext|>``.

    Args:
        vocab_file: JSON object of token to id.
        merge_file: one merge a line.

    Raises:
        DataError: a file cannot be used, or the vocabulary has no ``<|endoftext|>``.
    """

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        super().__init__(vocab_file, merge_file)
        self.tokenizer = GPT2Tokenizer(vocab_file, merge_file, errors="replace", special_tokens=[])
        self.notice = self.tokenizer.notice
        if END_OF_TEXT not in self.tokenizer.encoder:
            raise DataError(
                f"--vocab-file {vocab_file}: no token {END_OF_TEXT}, which ends documents; add it to the "
                "vocabulary with the next free id"
            )
        self.eod_id = self.tokenizer.encoder[END_OF_TEXT]

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer.encoder)

    @property
    def vocab(self) -> dict[str, int]:
        return self.tokenizer.encoder

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self.tokenizer.decoder

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def tokenize_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self.tokenizer.encode_flat(texts)

    def detokenize(self, token_ids: Iterable[int]) -> str:
        return self.tokenizer.decode(token_ids)

    @property
    def eod(self) -> int:
        return self.eod_id


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def bytes_to_unicode() -> dict[int, str]:
    """The printable character that stands for each of the 256 bytes in GPT-2's files."""
    return dict(byte_to_character())


def get_pairs(word: Sequence[str]) -> set[tuple[str, str]]:
    """The pairs of adjacent symbols in ``word``."""
    return set(pairwise(word))
