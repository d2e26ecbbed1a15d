"""The tokenizer types BertWordPieceLowerCase and BertWordPieceCase."""

from collections.abc import Iterable, Sequence

from megatron.core.errors import DataError
from megatron.training.tokenizer.base import BatchTokenizer
from megatron.training.tokenizer.bert_tokenization import FLAG, VOCABULARY, FullTokenizer


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
