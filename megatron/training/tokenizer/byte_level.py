"""Byte-level BPE in GPT-2's file format: a JSON vocabulary and a list of merges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from megatron.core.errors import DataError
from megatron.training.tokenizer.files import existing_file, read_json, read_text
from megatron.training.tokenizer.libraries import need

if TYPE_CHECKING:
    import tokenizers

VOCABULARY = "the JSON object of tokens and ids that belongs to the merges (GPT-2's is gpt2-vocab.json)"
MERGES = "the list of merges that belongs to the vocabulary (GPT-2's is gpt2-merges.txt)"


@dataclass(frozen=True)
class ByteLevelFiles:
    """The content of a vocabulary file and a merges file that fit each other."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]


@cache
def byte_to_character() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte.

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
            f"--vocab-file {vocab_file}: not a byte-level vocabulary, {len(lacking)} of the 256 "
            f"bytes have no "
            f"token (the first is 0x{lacking[0]:02X}), so some texts would lose characters; give {VOCABULARY}"
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
