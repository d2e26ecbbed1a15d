"""The tokenizer type TikTokenizer: tiktoken on a JSON vocabulary, special ids first."""

import base64
import binascii
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.errors import ConfigError, DataError
from megatron.training.tokenizer.base import (
    BatchTokenizer,
    existing_file,
    need,
    read_json,
    refuse_lone_surrogates,
)

PATTERN_TIKTOKEN = r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
PATTERN_TIKTOKEN_V2 = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"v1": PATTERN_TIKTOKEN, "v2": PATTERN_TIKTOKEN_V2}

DEFAULT_VOCAB_SIZE = 131072
DEFAULT_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")

FLAG = "--tokenizer-model"
VOCABULARY = (
    "the JSON list of {rank, token_bytes, token_str} sorted by rank that TikTokenizer reads "
    "(not OpenAI's .tiktoken file)"
)


def reload_mergeable_ranks(path: str, max_vocab: int | None = None) -> dict[bytes, int]:
    """Bytes of each token to its rank, from a JSON vocabulary.

    Args:
        path: JSON list of objects with rank (int), token_bytes (base64) and token_str, sorted by rank; the
            first 256 are the single bytes in order.
        max_vocab: keep this many ranks; None keeps all.

    Raises:
        DataError: the file is not such a list; names the entry.
    """
    entries = read_json(existing_file(path, FLAG, VOCABULARY), FLAG, VOCABULARY)
    if not isinstance(entries, list):
        raise DataError(f"{FLAG} {path}: {type(entries).__name__} instead of a list; give {VOCABULARY}")
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries[:max_vocab]):
        token = _token_bytes(entry, rank, path)
        if token in ranks:
            raise DataError(
                f"{FLAG} {path}: entries {ranks[token]} and {rank} are the same bytes {token!r}; every token "
                "must be there once"
            )
        ranks[token] = rank
    if len(ranks) < 256:
        raise DataError(
            f"{FLAG} {path}: {len(ranks)} entries are fewer than the 256 single bytes; give {VOCABULARY}"
        )
    return ranks


def _token_bytes(entry: Any, rank: int, path: str) -> bytes:
    where = f"{FLAG} {path}: entry {rank}"
    if not isinstance(entry, dict) or not {"rank", "token_bytes", "token_str"} <= entry.keys():
        raise DataError(f"{where} is not an object with rank, token_bytes and token_str; give {VOCABULARY}")
    if entry["rank"] != rank:
        raise DataError(
            f"{where} has rank {entry['rank']!r}; entries must be sorted by rank, from 0, without gaps"
        )
    try:
        token = base64.b64decode(entry["token_bytes"], validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise DataError(f"{where}: token_bytes is not base64 ({error}); give {VOCABULARY}") from error
    if rank < 256 and token != bytes([rank]):
        raise DataError(f"{where} must be the single byte 0x{rank:02X}, not {token!r}; give {VOCABULARY}")
    return token


class CustomTikTokenizer(BatchTokenizer):
    """tiktoken with ``num_special_tokens`` ids in front of the ranks; ``eod`` is ``</s>``.

    Args:
        path: JSON vocabulary, see ``reload_mergeable_ranks``.
        pattern: split expression, ``PATTERN_TIKTOKEN`` or ``PATTERN_TIKTOKEN_V2``.
        vocab_size: ids altogether, special ones included; None is 131072.
        num_special_tokens: special ids; those without a name are ``<SPECIAL_i>``.
        special_tokens: names of the first ones, ``<unk>``, ``<s>`` and ``</s>`` among them; None is just
        these.

    Raises:
        ConfigError: numbers or names that do not fit each other.
        DataError: a vocabulary that cannot be used, or is smaller than ``vocab_size`` asks for.
    """

    def __init__(
        self,
        path: str,
        pattern: str,
        vocab_size: int | None,
        num_special_tokens: int,
        special_tokens: list[str] | None,
    ) -> None:
        super().__init__(
            path,
            pattern=pattern,
            vocab_size=vocab_size,
            num_special_tokens=num_special_tokens,
            special_tokens=special_tokens,
        )
        size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
        names = list(DEFAULT_SPECIAL_TOKENS if special_tokens is None else special_tokens)
        _check_special_tokens(names, num_special_tokens, size)
        names += [f"<SPECIAL_{index}>" for index in range(len(names), num_special_tokens)]
        ranks = reload_mergeable_ranks(path, max_vocab=size - num_special_tokens)
        if len(ranks) + num_special_tokens < size:
            raise DataError(
                f"{FLAG} {path}: {len(ranks)} tokens and {num_special_tokens} special ones are fewer than "
                f"the vocabulary of {size}; give --vocab-size {len(ranks) + num_special_tokens}"
            )
        library = need("tiktoken", "TikTokenizer")
        # Special tokens stay unknown to tiktoken: text that spells one is ordinary text.
        self._model = library.Encoding(
            name=Path(path).stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self._offset = num_special_tokens
        self._size = size
        self._id_to_token = dict(enumerate(names))
        for token, rank in ranks.items():
            self._id_to_token[rank + self._offset] = token.decode("utf-8", errors="replace")
        # Parts of characters all decode to U+FFFD: the first one keeps the entry.
        self._token_to_id = {token: index for index, token in reversed(self._id_to_token.items())}
        self._bos, self._eos, self._unk = (names.index(name) for name in ("<s>", "</s>", "<unk>"))

    @property
    def bos(self) -> int:
        return self._bos

    @property
    def eos(self) -> int:
        return self._eos

    @property
    def unk(self) -> int:
        return self._unk

    @property
    def eod(self) -> int:
        return self._eos

    @property
    def vocab(self) -> dict[str, int]:
        return self._token_to_id

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self._id_to_token

    def tokenize(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of ``s``, with ``<s>`` first and ``</s>`` last if asked for."""
        refuse_lone_surrogates([s])
        ids = [index + self._offset for index in self._model.encode_ordinary(s)]
        return [self._bos] * bos + ids + [self._eos] * eos

    def tokenize_batch(self, texts: Sequence[str]) -> list[Any]:
        refuse_lone_surrogates(texts)
        return [
            self._model.encode_to_numpy(text, disallowed_special=()).astype("int32") + self._offset
            for text in texts
        ]

    def detokenize(self, tokens: Iterable[int]) -> str:
        """Text of ids; special ones by their names."""
        text, run = "", []
        for index in map(int, tokens):
            if not 0 <= index < self._size:
                raise DataError(f"token id {index} is outside the vocabulary of {self._size} tokens")
            if index < self._offset:
                text += self._model.decode(run) + self._id_to_token[index]
                run = []
            else:
                run.append(index - self._offset)
        return text + self._model.decode(run)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        """Where each id begins, in characters of the text that ``detokenize(ids)`` gives."""
        starts, characters = [], 0
        for index in ids:
            if index < self._offset:
                starts.append(characters)
                characters += len(self._id_to_token[index])
                continue
            token = self._model.decode_single_token_bytes(index - self._offset)
            # Bytes 0b10xxxxxx continue a character: an id that starts with one belongs to the previous one.
            begun = sum((byte & 0xC0) != 0x80 for byte in token)
            starts.append(characters - ((token[0] & 0xC0) == 0x80 and characters > 0))
            characters += begun
        return starts

    @property
    def vocab_size(self) -> int:
        return self._size

    @property
    def encoder(self) -> dict[str, int]:
        return self._token_to_id

    @property
    def decoder(self) -> dict[int, str]:
        return self._id_to_token


def _check_special_tokens(names: Sequence[str], count: int, size: int) -> None:
    missing = [name for name in DEFAULT_SPECIAL_TOKENS if name not in names]
    if missing:
        raise ConfigError(
            f"--tiktoken-special-tokens {' '.join(names)}: lacks {' '.join(missing)}, which TikTokenizer "
            f"needs; give --tiktoken-special-tokens {' '.join([*names, *missing])}"
        )
    if len(set(names)) < len(names):
        raise ConfigError(f"--tiktoken-special-tokens {' '.join(names)}: every name may be there once")
    if len(names) > count:
        raise ConfigError(
            f"--tiktoken-num-special-tokens {count}: {len(names)} special tokens are named; give at least "
            "that many"
        )
    if size - count < 256:
        raise ConfigError(
            f"--vocab-size {size}: {count} special tokens leave {size - count} ids, too few for the 256 "
            f"bytes; give --vocab-size {count + 256} or more, or fewer --tiktoken-num-special-tokens"
        )
