"""Tokenizers without a vocabulary file: their texts are decimal ids."""

from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from megatron.core.errors import DataError, NotBuiltYetError, NotOfferedError
from megatron.training.tokenizer.base import BatchTokenizer


class _NullTokenizer(BatchTokenizer):
    """Text is decimal ids with blanks between them; ``eod`` is ``vocab_size``, so there is one token more.

    Args:
        vocab_size: number of ordinary tokens N; ids go from 0 to N, N being the end of a document.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(None, vocab_size=vocab_size)
        self._eod_id = int(vocab_size)

    def tokenize(self, text: str) -> list[int]:
        """Raises DataError for a word that is not an id from 0 to N."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            word = next(word for word in text.split() if not _is_integer(word))
            raise DataError(
                f"NullTokenizer: {word[:40]!r} is not an id; its text is decimal ids with blanks between "
                "them. Use another --tokenizer-type for ordinary text"
            ) from None
        if ids and not (min(ids) >= 0 and max(ids) <= self._eod_id):
            wrong = next(index for index in ids if not 0 <= index <= self._eod_id)
            raise DataError(
                f"NullTokenizer: id {wrong} is not between 0 and {self._eod_id}; give --vocab-size of at "
                f"least {max(ids)} or mend the text"
            )
        return ids

    def detokenize(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(index)) for index in ids)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        """First character of each id in the text that ``detokenize(ids)`` gives."""
        starts, start = [], 0
        for index in ids:
            starts.append(start)
            start += len(str(index)) + 1
        return starts

    @property
    def vocab_size(self) -> int:
        return self._eod_id + 1

    @property
    def vocab(self) -> Mapping[str, int]:
        raise NotOfferedError("NullTokenizer has no vocabulary: any id is a token")

    @property
    def inv_vocab(self) -> Mapping[int, str]:
        raise NotOfferedError("NullTokenizer has no vocabulary: any id is a token")

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
        return self._eod_id

    @property
    def additional_special_tokens_ids(self) -> None:
        return None


def _is_integer(word: str) -> bool:
    try:
        int(word)
    except ValueError:
        return False
    return True


# ---- For scripts written for Megatron-LM: nothing in this project calls what follows ----


class _NullMultimodalTokenizer(BatchTokenizer):
    """Name of the multimodal variant, for scripts that import it; there are no multimodal models here."""

    def __init__(
        self, vocab_size: int, image_token: str | None = None, image_token_id: int | None = None
    ) -> NoReturn:
        raise NotBuiltYetError(
            "multimodal training",
            "--tokenizer-type NullMultimodalTokenizer",
            "Use --tokenizer-type NullTokenizer for text given as ids.",
        )

    tokenize: Any = property()
    vocab: Any = property()
    inv_vocab: Any = property()
    vocab_size: Any = property()
