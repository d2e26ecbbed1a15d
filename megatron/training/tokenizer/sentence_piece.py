"""The tokenizer types made from a SentencePiece model."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from megatron.core.errors import DataError
from megatron.training.tokenizer.base import BatchTokenizer, existing_file, need, refuse_lone_surrogates

FLAG = "--tokenizer-model"
MODEL = "a SentencePiece model (tokenizer.model)"


def load_sentence_piece(model_file: str) -> Any:
    """``sentencepiece.SentencePieceProcessor`` of a file.

    Raises:
        DataError: no such file, or not a SentencePiece model.
    """
    content = existing_file(model_file, FLAG, MODEL).read_bytes()
    library = need("sentencepiece", f"the tokenizer {model_file}")
    processor = library.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError as error:
        hint = (
            " (it looks like JSON: use --tokenizer-type HuggingFaceTokenizer)" if content[:1] in b"{[" else ""
        )
        raise DataError(
            f"{FLAG} {model_file}: not a SentencePiece model{hint}, or cut short; give {MODEL}"
        ) from error
    return processor


class _SentencePieceTokenizer(BatchTokenizer):
    """SentencePiece with added special tokens; text that spells one of them becomes that token.

    ``<CLS>``, ``<SEP>``, ``<EOD>``, ``<MASK>``, the model's pad, bos and eos pieces (``<PAD>``, ``<BOS>``,
    ``<EOS>`` where it has none) and ``<extra_id_k>`` keep the id of an existing piece or get the next free
    one.

    Args:
        model_file: the model.
        vocab_extra_ids: number of sentinels ``<extra_id_k>``.

    Attributes:
        tokenizer: the ``sentencepiece.SentencePieceProcessor``.
    """

    def __init__(self, model_file: str, vocab_extra_ids: int = 0) -> None:
        super().__init__(model_file, vocab_extra_ids=vocab_extra_ids)
        self.tokenizer = load_sentence_piece(model_file)
        pieces = [self.tokenizer.id_to_piece(index) for index in range(self.tokenizer.get_piece_size())]
        self._inv_vocab = dict(enumerate(pieces))
        self._vocab = {piece: index for index, piece in self._inv_vocab.items()}
        self._special_tokens: dict[str, int] = {}
        self._add_special_tokens(vocab_extra_ids)

    def _add_special_tokens(self, vocab_extra_ids: int) -> None:
        self._cls_id = self._add_special_token("<CLS>")
        self._sep_id = self._add_special_token("<SEP>")
        self._eod_id = self._add_special_token("<EOD>")
        self._mask_id = self._add_special_token("<MASK>")
        self._pad_id = self._add_special_token(self._own_piece(self.tokenizer.pad_id(), "<PAD>"))
        self._bos_id = self._add_special_token(self._own_piece(self.tokenizer.bos_id(), "<BOS>"))
        self._eos_id = self._add_special_token(self._own_piece(self.tokenizer.eos_id(), "<EOS>"))
        self._sentinels = [self._add_special_token(f"<extra_id_{k}>") for k in range(vocab_extra_ids)]
        self._special_names = {index: token for token, index in self._special_tokens.items()}
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, self._special_tokens)) + ")")

    def _own_piece(self, index: int, otherwise: str) -> str:
        """The model's piece; SentencePiece says -1 for one that it does not have."""
        return self._inv_vocab.get(index, otherwise)

    def _add_special_token(self, token: str) -> int:
        if token not in self._vocab:
            index = len(self._inv_vocab)
            self._vocab[token], self._inv_vocab[index] = index, token
        self._special_tokens[token] = self._vocab[token]
        return self._vocab[token]

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        # Splitting by a group gives ordinary text at even indices and special tokens at odd ones.
        for index, part in enumerate(self._special_pattern.split(text)):
            if index % 2:
                ids.append(self._special_tokens[part])
            else:
                ids += self._encode(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        """The model's own ids, without special tokens."""
        try:
            return self.tokenizer.encode(text, out_type=int)
        except (RuntimeError, TypeError, UnicodeEncodeError):
            refuse_lone_surrogates([text])
            raise

    def detokenize(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens have a blank on either side."""
        text, run = "", []
        for index in map(int, ids):
            if index in self._special_names:
                text += f"{self._decode(run)} {self._special_names[index]} "
                run = []
            else:
                run.append(index)
        return text + self._decode(run)

    def _decode(self, ids: Iterable[int]) -> str:
        """Text of the model's own ids. Raises DataError for an id that it does not have."""
        ids = [int(index) for index in ids]
        size = self.tokenizer.get_piece_size()
        wrong = next((index for index in ids if not 0 <= index < size), None)
        if wrong is not None:
            raise DataError(f"token id {wrong} is outside the SentencePiece model of {size} pieces")
        return self.tokenizer.decode(ids)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        """Where each id begins, in characters of the decoded text."""
        need("google.protobuf", "offsets of SentencePiece ids", "protobuf")
        decoded = self.tokenizer.decode([int(index) for index in ids], out_type="proto")
        # The library counts bytes of UTF-8.
        raw = decoded.text.encode("utf-8")
        return [len(raw[: piece.begin].decode("utf-8", errors="ignore")) for piece in decoded.pieces]

    @property
    def vocab_size(self) -> int:
        return len(self._inv_vocab)

    @property
    def vocab(self) -> dict[str, int]:
        return self._vocab

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self._inv_vocab

    @property
    def decoder(self) -> dict[int, str]:
        return self._inv_vocab

    @property
    def encoder(self) -> dict[str, int]:
        return self._vocab

    @property
    def cls(self) -> int:
        return self._cls_id

    @property
    def sep(self) -> int:
        return self._sep_id

    @property
    def pad(self) -> int:
        return self._pad_id

    @property
    def bos(self) -> int:
        return self._bos_id

    @property
    def eod(self) -> int:
        return self._eod_id

    @property
    def eos(self) -> int:
        return self._eos_id

    @property
    def mask(self) -> int:
        return self._mask_id

    @property
    def additional_special_tokens_ids(self) -> list[int] | None:
        return self._sentinels


class _GPTSentencePieceTokenizer(_SentencePieceTokenizer):
    """SentencePiece as it is, nothing added; ``eod`` is the model's eos id."""

    def __init__(self, model_file: str) -> None:
        super().__init__(model_file, vocab_extra_ids=0)
        if self._eos_id < 0:
            raise DataError(
                f"{FLAG} {model_file}: the model has no end-of-sequence piece, which ends documents; "
                "use --tokenizer-type SentencePieceTokenizer, which adds one"
            )

    def _add_special_tokens(self, vocab_extra_ids: int) -> None:
        self._pad_id = self.tokenizer.pad_id()
        self._bos_id = self.tokenizer.bos_id()
        self._eos_id = self.tokenizer.eos_id()

    def tokenize(self, text: str) -> list[int]:
        return self._encode(text)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return self.tokenizer.encode(list(texts), out_type=int, num_threads=1)
        except (RuntimeError, TypeError, UnicodeEncodeError):
            refuse_lone_surrogates(texts)
            raise

    def detokenize(self, ids: Iterable[int]) -> str:
        return self._decode(ids)

    @property
    def cls(self) -> int:
        return -1

    @property
    def sep(self) -> int:
        return -1

    @property
    def mask(self) -> int:
        return -1

    @property
    def eod(self) -> int:
        return self._eos_id

    @property
    def additional_special_tokens_ids(self) -> None:
        return None


class _Llama2Tokenizer(_GPTSentencePieceTokenizer):
    """SentencePiece with the bos id in front of every text; ``eod`` is the model's eos id."""

    def tokenize(self, s: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Ids of ``s``, with the bos id first and the eos id last if asked for."""
        return [self._bos_id] * bos + self._encode(s) + [self._eos_id] * eos

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[self._bos_id, *ids] for ids in super().tokenize_batch(texts)]
