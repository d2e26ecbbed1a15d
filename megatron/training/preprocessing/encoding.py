"""Texts of a block to packed token arrays, whole or split into sentences by NLTK's punkt."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from megatron.core.datasets.indexed_dataset import DType
from megatron.core.errors import ConfigError
from megatron.training.preprocessing.readers import Block
from megatron.training.preprocessing.records import RecordError, values_of
from megatron.training.tokenizer import build_tokenizer


@dataclass
class Packed:
    """The tokens of some consecutive documents under one key.

    Args:
        tokens: ids of all sequences back to back, in the dtype of the data set.
        sequence_lengths: int32, tokens in each sequence, none of them 0.
        sequences_per_document: int64, 0 for an empty document; None when every document is one sequence.
    """

    tokens: np.ndarray
    sequence_lengths: np.ndarray
    sequences_per_document: np.ndarray | None


@dataclass
class EncodedBlock:
    """Tokens of one block: one :class:`Packed` for each key, in the order of ``--json-keys``."""

    documents: int
    keys: list[Packed]


@dataclass(frozen=True)
class TokenizerFacts:
    """Properties of the workers' tokenizer that the coordinator needs."""

    vocab_size: int | None
    dtype: type[np.integer]


class Encoder:
    """Parses and tokenizes blocks. Built once in every worker process, from the arguments.

    Args:
        args: tokenizer flags, and those of ``flags.py`` about keys, sentences and the end of documents.

    Raises:
        ConfigError: the tokenizer has no end-of-document id, or the sentence splitter is missing.
        MegatronError: whatever the tokenizer's own files give rise to.
    """

    def __init__(self, args: Namespace):
        self._keys: list[str] = args.json_keys
        self._split = load_splitter(args.lang, args.keep_newlines) if args.split_sentences else None
        self._tokenizer = build_tokenizer(args)
        self._eod = _eod_of(self._tokenizer, args.tokenizer_type) if args.append_eod else None
        vocab_size = self._tokenizer.vocab_size
        self.facts = TokenizerFacts(vocab_size, DType.optimal_dtype(vocab_size))

    def __call__(self, block: Block) -> EncodedBlock:
        """Encode one block.

        Raises:
            RecordError: a record that cannot be used, with its index in the block.
        """
        columns = values_of(block, self._keys)
        packed = [self._encode(key, column) for key, column in zip(self._keys, columns, strict=True)]
        return EncodedBlock(len(columns[0]), packed)

    def _encode(self, key: str, values: list[str | list[str]]) -> Packed:
        texts, counts = self._sentences(values)
        ids, lengths = self._tokenize(key, texts, counts)
        if len(ids):
            self._check_range(key, ids, lengths, counts)
        return pack(ids, lengths, counts, self._eod, self.facts.dtype)

    def _sentences(self, values: list[str | list[str]]) -> tuple[list[str], np.ndarray | None]:
        """All texts to tokenize, and how many of them belong to each document (None: one each)."""
        if self._split is None and all(type(value) is str for value in values):
            return cast(list[str], values), None
        split = self._split or (lambda text: [text])
        documents = [split(value) if isinstance(value, str) else value for value in values]
        counts = np.fromiter((len(sentences) for sentences in documents), np.int64, len(documents))
        return [sentence for sentences in documents for sentence in sentences], counts

    def _tokenize(
        self, key: str, texts: list[str], counts: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return np.empty(0, np.int32), np.empty(0, np.int64)
        try:
            return self._tokenizer.tokenize_flat(texts)
        except MemoryError:
            raise
        except Exception:
            self._find_refused_text(key, texts, counts)
            raise

    def _find_refused_text(self, key: str, texts: list[str], counts: np.ndarray | None) -> None:
        """Tokenize one by one, to name the record whose text the tokenizer does not take."""
        for index, text in enumerate(texts):
            try:
                self._tokenizer.tokenize_flat([text])
            except Exception as error:
                problem = f"the tokenizer does not take the text of the key '{key}': {error}"
                raise RecordError(_document_of(index, counts), problem) from error

    def _check_range(self, key: str, ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None) -> None:
        limit = np.iinfo(self.facts.dtype).max
        if ids.min() >= 0 and ids.max() <= limit:
            return
        first = int(np.flatnonzero((ids < 0) | (ids > limit))[0])
        index = int(np.searchsorted(np.cumsum(lengths), first, side="right"))
        raise RecordError(
            _document_of(index, counts),
            f"the text of the key '{key}' gives the token id {ids[first]}, which a vocabulary of "
            f"{self.facts.vocab_size} (stored as {np.dtype(self.facts.dtype).name}) cannot hold",
        )


def pack(
    ids: np.ndarray, lengths: np.ndarray, counts: np.ndarray | None, eod: int | None, dtype: type[np.number]
) -> Packed:
    """Drop empty sequences, append the end-of-document id, convert to the stored dtype.

    Args:
        ids: tokens of all sequences back to back.
        lengths: tokens in each sequence, 0 allowed.
        counts: sequences in each document; None when every document is one sequence.
        eod: id appended to the last sequence of every document that has tokens, or None.
        dtype: of the data set.
    """
    per_document = None
    full = lengths > 0
    if counts is not None or not full.all():
        counts = np.ones(len(lengths), np.int64) if counts is None else counts
        document = np.repeat(np.arange(len(counts)), counts)  # of each sequence
        per_document = np.bincount(document[full], minlength=len(counts))
        lengths = lengths[full]
    lengths = lengths.astype(np.int32)
    if eod is None or not len(lengths):
        return Packed(ids.astype(dtype), lengths, per_document)
    filled = np.ones(len(lengths), np.int64) if per_document is None else per_document[per_document > 0]
    last = np.cumsum(filled) - 1  # sequence of each document that has one
    lengths[last] += 1
    ends = np.cumsum(lengths, dtype=np.int64)[last] - 1
    tokens = np.empty(len(ids) + len(last), dtype)
    is_token = np.ones(len(tokens), bool)
    is_token[ends] = False
    tokens[is_token] = ids
    tokens[ends] = eod
    return Packed(tokens, lengths, per_document)


def _document_of(text_index: int, counts: np.ndarray | None) -> int:
    """Index of the document to which a text belongs."""
    return text_index if counts is None else int(np.searchsorted(np.cumsum(counts), text_index, side="right"))


def _eod_of(tokenizer: Any, name: str) -> int:
    try:
        eod = tokenizer.eod
    except (NotImplementedError, AttributeError):
        eod = None
    if eod is None:
        raise ConfigError(
            f"--append-eod: the tokenizer {name} has no end-of-document token; leave the flag out"
        )
    return int(eod)


Splitter = Callable[[str], list[str]]

# Punkt keeps lists as long as its text; Megatron cuts the text at this many characters, sentence end or not.
_PIECE_CHARACTERS = 1_000_000


def load_splitter(language: str, keep_newlines: bool) -> Splitter:
    """A function that cuts a text into sentences.

    Args:
        language: name of a punkt model, such as "english".
        keep_newlines: leave the white space between two sentences at the end of the first one; otherwise
            it is dropped.

    Raises:
        ConfigError: NLTK or its model for this language is missing.
    """
    try:
        from nltk.tokenize.punkt import PunktTokenizer
    except ImportError as error:
        raise ConfigError(
            "--split-sentences needs the package nltk, 3.9 or newer: pip install nltk"
        ) from error
    try:
        punkt = PunktTokenizer(language)
    except (LookupError, OSError) as error:
        raise ConfigError(
            f"--split-sentences --lang {language}: NLTK has no punkt model of that name. Get the models with "
            "'python -m nltk.downloader punkt_tab', or set NLTK_DATA to the directory that holds "
            f"tokenizers/punkt_tab/{language} (the older .pickle models are not read: a pickle can run code)"
        ) from error

    def split(text: str) -> list[str]:
        pieces = (text[i : i + _PIECE_CHARACTERS] for i in range(0, len(text), _PIECE_CHARACTERS))
        return [sentence for piece in pieces for sentence in _sentences(piece)]

    def _sentences(piece: str) -> list[str]:
        spans = list(punkt.span_tokenize(piece))
        if keep_newlines:
            following = [*(start for start, _ in spans[1:]), spans[-1][1]] if spans else []
            return [piece[start:end] for (start, _), end in zip(spans, following, strict=True)]
        return [piece[start:end] for start, end in spans]

    return split
