"""The tokenizer type GPT2BPETokenizer."""

from collections.abc import Iterable, Sequence

import numpy as np

from megatron.core.errors import DataError
from megatron.training.tokenizer.base import BatchTokenizer
from megatron.training.tokenizer.gpt2_tokenization import GPT2Tokenizer

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
