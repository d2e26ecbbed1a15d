"""BERT's tokenizer: clean, split, then greedy word pieces; and the types BertWordPieceLowerCase and -Case.

The library ``tokenizers`` does the work, but for one thing: Python lower-cases before it does, because BERT
lower-cased whole words (a final capital sigma becomes ς) where ``tokenizers`` lower-cases character by
character (σ).
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from megatron.core.errors import DataError
from megatron.training.tokenizer.base import (
    BatchTokenizer,
    existing_file,
    need,
    read_text,
    refuse_lone_surrogates,
)

logger = logging.getLogger(__name__)

FLAG = "--vocab-file"
VOCABULARY = "a BERT vocabulary with one token a line (vocab.txt)"
LONGEST_WORD = 200
"""Characters; a longer word is unknown as a whole."""

Key = TypeVar("Key")
Value = TypeVar("Value")


def convert_to_unicode(text: str | bytes) -> str:
    """Text as str; bytes are read as UTF-8, and what is not UTF-8 in them is dropped."""
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="ignore")
    if not isinstance(text, str):
        raise ValueError(f"str or bytes expected, not {type(text).__name__}")
    return text


def load_vocab(vocab_file: str) -> OrderedDict[str, int]:
    """Token to id from a file with one token a line; ids are line numbers from 0.

    Raises:
        DataError: missing, empty or not UTF-8.
    """
    lines = read_text(existing_file(vocab_file, FLAG, VOCABULARY), FLAG, VOCABULARY).split("\n")
    if not lines[-1]:
        lines.pop()
    return OrderedDict((line.strip(), index) for index, line in enumerate(lines))


def convert_by_vocab(vocab: Mapping[Key, Value], items: Iterable[Key]) -> list[Value]:
    """Look every item up. Raises DataError for one that is not there."""
    try:
        return [vocab[item] for item in items]
    except KeyError as error:
        raise DataError(f"{error.args[0]!r} is not in the vocabulary of {len(vocab)} tokens") from None


def convert_ids_to_tokens(inv_vocab: Mapping[int, str], ids: Iterable[int]) -> list[str]:
    """Tokens of ids."""
    return convert_by_vocab(inv_vocab, map(int, ids))


def _splitter(do_lower_case: bool) -> tuple[Any, Any]:
    """BERT's normalizer and pre-tokenizer."""
    library = need("tokenizers", "BERT word pieces")
    normalizer = library.normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, strip_accents=do_lower_case, lowercase=do_lower_case
    )
    return normalizer, library.pre_tokenizers.BertPreTokenizer()


def _word_pieces(vocab: Mapping[str, int], unk_token: str, max_input_chars_per_word: int) -> Any:
    library = need("tokenizers", "BERT word pieces")
    return library.models.WordPiece(
        vocab=dict(vocab), unk_token=unk_token, max_input_chars_per_word=max_input_chars_per_word
    )


class FullTokenizer:
    """``BasicTokenizer``, then ``WordpieceTokenizer``.

    Attributes:
        vocab: token to id; tokens that a caller adds get ids, and are never found in a text.
        inv_vocab: id to token.

    Args:
        vocab_file: one token a line.
        do_lower_case: lower-case the text and remove accents.

    Raises:
        DataError: the file cannot be used, or has no ``[UNK]``.
    """

    def __init__(self, vocab_file: str, do_lower_case: bool = True) -> None:
        self.vocab = load_vocab(vocab_file)
        if "[UNK]" not in self.vocab:
            raise DataError(f"{FLAG} {vocab_file}: no token [UNK], so not {VOCABULARY}; give one")
        self.inv_vocab = {index: token for token, index in self.vocab.items()}
        self.do_lower_case = do_lower_case
        self._pipeline = need("tokenizers", "BERT word pieces").Tokenizer(
            _word_pieces(self.vocab, "[UNK]", LONGEST_WORD)
        )
        self._pipeline.normalizer, self._pipeline.pre_tokenizer = _splitter(do_lower_case)

    def tokenize(self, text: str | bytes) -> list[str]:
        """The pieces of ``text``. Raises DataError for a lone surrogate."""
        # Not the encoding's own tokens: the fast call leaves them empty.
        ids = self._encode([convert_to_unicode(text)])[0].ids
        return [self.inv_vocab[index] for index in ids]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [encoding.ids for encoding in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        try:
            return self._pipeline.encode_batch_fast(
                [text.lower() for text in texts] if self.do_lower_case else list(texts),
                add_special_tokens=False,
            )
        except (TypeError, UnicodeEncodeError):
            refuse_lone_surrogates(texts)
            raise

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Ids of tokens. Raises DataError for an unknown one."""
        return convert_by_vocab(self.vocab, tokens)

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Tokens of ids. Raises DataError for an unknown one."""
        return convert_ids_to_tokens(self.inv_vocab, ids)

    @staticmethod
    def convert_tokens_to_string(tokens: Iterable[str], clean_up_tokenization_spaces: bool = True) -> str:
        """Text of tokens: pieces joined, blanks before punctuation and English contractions taken out."""
        text = " ".join(tokens).replace(" ##", "").strip()
        if clean_up_tokenization_spaces:
            for spaced, tight in CLEAN_UP:
                text = text.replace(spaced, tight)
        return text

    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self.vocab)


CLEAN_UP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


class _BertWordPieceTokenizer(BatchTokenizer):
    """BERT's word pieces, with ``[BOS]``, ``[EOS]`` and sentinels ``<extra_id_k>``; ``eod`` is ``[EOS]``.

    Args:
        vocab_file: one token a line.
        lower_case: lower-case the text and remove accents.
        vocab_extra_ids: number of sentinels.

    Attributes:
        tokenizer: the ``FullTokenizer``.

    Raises:
        DataError: the file cannot be used, or lacks one of the tokens BERT needs.
    """

    def __init__(self, vocab_file: str, lower_case: bool = True, vocab_extra_ids: int = 0) -> None:
        super().__init__(vocab_file, lower_case=lower_case, vocab_extra_ids=vocab_extra_ids)
        self.tokenizer = FullTokenizer(vocab_file, do_lower_case=lower_case)
        lacking = [
            token for token in ("[CLS]", "[SEP]", "[PAD]", "[MASK]") if token not in self.tokenizer.vocab
        ]
        if lacking:
            raise DataError(f"{FLAG} {vocab_file}: no token {', '.join(lacking)}; give {VOCABULARY}")
        self._additional_special_tokens: list[str] = []
        self._bos_token, self._eos_token = "[BOS]", "[EOS]"
        self.add_token(self._bos_token)
        self.add_token(self._eos_token)
        self.add_additional_special_tokens([f"<extra_id_{k}>" for k in range(vocab_extra_ids)])

    def add_token(self, token: str) -> None:
        """Give ``token`` the next free id, unless it is there already."""
        if token not in self.vocab:
            index = self.vocab_size
            self.vocab[token], self.inv_vocab[index] = index, token

    def add_additional_special_tokens(self, tokens_list: Sequence[str]) -> None:
        """Make these the sentinels, adding those that are new."""
        self._additional_special_tokens = list(tokens_list)
        for token in tokens_list:
            self.add_token(token)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size()

    @property
    def vocab(self) -> dict[str, int]:
        return self.tokenizer.vocab

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self.tokenizer.inv_vocab

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode_batch([text])[0]

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, pieces joined, blanks before punctuation taken out."""
        return self.tokenizer.convert_tokens_to_string(self.tokenizer.convert_ids_to_tokens(ids))

    def detokenize(self, token_ids: Iterable[int]) -> str:
        return self.decode(token_ids)

    def decode_token_ids(self, token_ids: Iterable[int]) -> str:
        """Text of ids without ``[PAD]`` and ``[CLS]``, every word with a blank before it."""
        tokens = self.tokenizer.convert_ids_to_tokens(token_ids)
        kept = [token for token in tokens if token not in ("[PAD]", "[CLS]")]
        return "".join(token[2:] if token.startswith("##") else f" {token}" for token in kept)

    @property
    def cls(self) -> int:
        return self.vocab["[CLS]"]

    @property
    def sep(self) -> int:
        return self.vocab["[SEP]"]

    @property
    def pad(self) -> int:
        return self.vocab["[PAD]"]

    @property
    def mask(self) -> int:
        return self.vocab["[MASK]"]

    @property
    def bos(self) -> int:
        return self.vocab[self._bos_token]

    @property
    def eos(self) -> int:
        return self.vocab[self._eos_token]

    @property
    def eod(self) -> int:
        return self.eos

    @property
    def bos_token(self) -> str:
        return self._bos_token

    @property
    def eos_token(self) -> str:
        return self._eos_token

    @property
    def additional_special_tokens(self) -> list[str]:
        return self._additional_special_tokens

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return [self.vocab[token] for token in self._additional_special_tokens]


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


def validate_case_matches_checkpoint(do_lower_case: bool, init_checkpoint: str | None) -> None:
    """Warn if the name of a published BERT checkpoint means the other case than ``do_lower_case``."""
    match = re.search(
        r"(?:^|/)(multi_)?(cased|uncased|multilingual|chinese)_L-\d+_H-\d+_A-\d+(?:/|$)",
        init_checkpoint or "",
    )
    if match is None:
        return
    lower = match.group(2) != "cased"
    if lower != do_lower_case:
        logger.warning(
            "the checkpoint %s was trained on %s text, but do_lower_case is %s",
            init_checkpoint,
            "lower-case" if lower else "cased",
            do_lower_case,
        )


def printable_text(text: str | bytes) -> str:
    """Text as str, for printing."""
    return convert_to_unicode(text)


def convert_tokens_to_ids(vocab: Mapping[str, int], tokens: Iterable[str]) -> list[int]:
    """Ids of tokens."""
    return convert_by_vocab(vocab, tokens)


def whitespace_tokenize(text: str) -> list[str]:
    """The words between blanks of any kind."""
    return text.split()


class BasicTokenizer:
    """Text to words: drops control characters, puts CJK characters on their own, splits at punctuation.

    Args:
        do_lower_case: also lower-case and remove accents.
    """

    def __init__(self, do_lower_case: bool = True) -> None:
        self.do_lower_case = do_lower_case
        self._normalizer, self._pre_tokenizer = _splitter(do_lower_case)

    def tokenize(self, text: str | bytes) -> list[str]:
        """The words of ``text``. Raises DataError for a lone surrogate."""
        text = convert_to_unicode(text)
        refuse_lone_surrogates([text])
        text = self._normalizer.normalize_str(text.lower() if self.do_lower_case else text)
        return [word for word, _ in self._pre_tokenizer.pre_tokenize_str(text)]


class WordpieceTokenizer:
    """Words to pieces: the longest that fits, from left to right; pieces inside a word begin with ``##``.

    Attributes:
        vocab: token to id.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        unk_token: str = "[UNK]",
        max_input_chars_per_word: int = LONGEST_WORD,
    ) -> None:
        self.vocab = vocab
        self.unk_token = unk_token
        # The library insists on an id for the unknown token, which need not be in ``vocab``.
        known = {unk_token: len(vocab), **vocab}
        self._model = _word_pieces(known, unk_token, max_input_chars_per_word)

    def tokenize(self, text: str | bytes) -> list[str]:
        """The pieces of all words of ``text``, which are separated by blanks."""
        words = whitespace_tokenize(convert_to_unicode(text))
        return [piece.value for word in words for piece in self._model.tokenize(word)]
