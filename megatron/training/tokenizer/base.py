"""What all tokenizers of the application add to ``MegatronTokenizer``: whole batches as flat arrays."""

from abc import ABC
from collections.abc import Sequence

import numpy as np

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.errors import DataError


class BatchTokenizer(MegatronTokenizer, ABC):
    """A tokenizer that can turn many texts into one flat array of ids.

    A subclass with a faster way to a batch overrides ``tokenize_flat`` or ``tokenize_batch``.
    """

    notice: str | None = None
    """One line for the user about how the tokenizer was built, printed once by ``build_tokenizer``."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """One sequence of ids for each text."""
        return [self.tokenize(text) for text in texts]

    def tokenize_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end, without a Python object per id.

        Args:
            texts: the documents; an empty one has length 0 unless the tokenizer adds special tokens.
        Returns:
            ids (int32, [sum of lengths]) and lengths (int64, [len(texts)]).
        Raises:
            DataError: a text holds half of a surrogate pair, which no file can hold as UTF-8.
        """
        return flatten(self.tokenize_batch(texts))


def flatten(batch: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids end to end (int32) and the length of each sequence (int64)."""
    lengths = np.fromiter((len(ids) for ids in batch), dtype=np.int64, count=len(batch))
    flat = np.empty(int(lengths.sum()), dtype=np.int32)
    end = 0
    for ids in batch:
        start, end = end, end + len(ids)
        flat[start:end] = ids
    return flat, lengths


def refuse_lone_surrogates(texts: Sequence[str]) -> None:
    """Raise DataError for the first text that is not encodable as UTF-8; otherwise do nothing."""
    for index, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            where = f"text {index} of {len(texts)}" if len(texts) > 1 else "the text"
            raise DataError(
                f"cannot tokenize {where}: character {error.start} is the lone surrogate "
                f"U+{ord(text[error.start]):04X}, half of a pair that UTF-8 cannot hold; "
                r"drop it or write the whole pair (such as \ud83d\ude00) where the text was made"
            ) from None
