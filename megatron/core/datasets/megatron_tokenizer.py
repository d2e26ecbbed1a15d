"""What the data sets know of a tokenizer."""

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any

import numpy as np

from megatron.core.errors import NotOfferedError


class MegatronTokenizer(ABC):
    """Base of all tokenizers.

    The constructor arguments identify the tokenizer: they are part of the hashes under which built
    sample indices are cached.

    Args:
        tokenizer_paths: files (or None) the tokenizer is made from.
        tokenizer_options: everything else; kept as text.
    """

    def __init__(self, *tokenizer_paths: str | None, **tokenizer_options: Any) -> None:
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict()
        self.unique_identifiers["class"] = type(self).__name__
        self.unique_identifiers["tokenizer_path"] = list(tokenizer_paths)
        for option, value in tokenizer_options.items():
            self.unique_identifiers[option] = str(value)
        self.unique_description = json.dumps(self.unique_identifiers, indent=4)

    @abstractmethod
    def tokenize(self, text: str) -> np.ndarray:
        """Text -> ids."""

    def tokenize_batch(self, texts: list[str]) -> list[np.ndarray | list[int]]:
        """Ids of many texts; tokenizers that do this faster than one by one override it."""
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: np.ndarray) -> str:
        """Ids -> text."""
        raise self._lacks("detokenize")

    def offsets(self, ids: list[int], text: str) -> list[int]:
        """Character offset in ``text`` of each id."""
        raise self._lacks("offsets")

    @property
    @abstractmethod
    def vocab(self) -> dict[str, int]:
        """Token -> id."""

    @property
    @abstractmethod
    def inv_vocab(self) -> dict[int, str]:
        """Id -> token."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, before padding."""

    @property
    def cls(self) -> int:
        """Id of the classification token."""
        raise self._lacks("cls")

    @property
    def sep(self) -> int:
        """Id of the separator token."""
        raise self._lacks("sep")

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        raise self._lacks("pad")

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""
        raise self._lacks("eod")

    @property
    def bos(self) -> int:
        """Id of the begin-of-sequence token."""
        raise self._lacks("bos")

    @property
    def eos(self) -> int:
        """Id of the end-of-sequence token."""
        raise self._lacks("eos")

    @property
    def mask(self) -> int:
        """Id of the mask token."""
        raise self._lacks("mask")

    def _lacks(self, what: str) -> NotOfferedError:
        return NotOfferedError(f"{type(self).__name__} has no {what!r}")
