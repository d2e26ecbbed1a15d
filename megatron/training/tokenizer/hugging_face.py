"""The tokenizer types HuggingFaceTokenizer and PretrainedFromHF, from local files of ``transformers``."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.core.errors import DataError
from megatron.training.tokenizer.base import (
    BatchTokenizer,
    existing_file,
    need,
    read_json,
    refuse_lone_surrogates,
)
from megatron.training.tokenizer.fast_bpe import PROBES, FastBpe, fast_bpe
from megatron.training.tokenizer.sentence_piece import load_sentence_piece

FLAG = "--tokenizer-model (or --tokenizer-name-or-path)"
WANTED = (
    "a directory with the tokenizer's files (tokenizer.json, or tokenizer_config.json and what it names) or "
    "a tokenizer.json"
)

# A directory with any of these holds a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)

# End-of-document tokens to try, for a tokenizer.json without the tokenizer_config.json that names one.
END_TOKENS = (
    "<|endoftext|>",
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<|im_end|>",
)


class MissingTokenError(DataError, NotImplementedError):
    """A token id was asked for that the tokenizer's files do not name."""


class _HuggingFaceTokenizer(BatchTokenizer):
    """A tokenizer of ``transformers``; ``eod`` is its eos token.

    Ids are those of calling the tokenizer on a text: if its files say that a bos token goes in front of every
    text, it does.

    Args:
        pretrained_model_name_or_path: a directory, a ``tokenizer.json``, or a name in the local cache.
        kwargs: handed to ``AutoTokenizer.from_pretrained``.

    Raises:
        DataError: nothing usable there, or not on this machine.
    """

    def __init__(self, pretrained_model_name_or_path: str, **kwargs: Any) -> None:
        super().__init__(pretrained_model_name_or_path, **kwargs)
        self._source = pretrained_model_name_or_path
        self._tokenizer, self.notice = _load(pretrained_model_name_or_path, kwargs)
        self._fast: FastBpe | None = None
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            self._fast, notice = fast_bpe(backend.to_str(), self._encode, add_special_tokens=True)
            self.notice = self.notice or notice

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._tokenizer)

    @cached_property
    def vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()

    @cached_property
    def inv_vocab(self) -> dict[int, str]:
        return {index: token for token, index in self.vocab.items()}

    @property
    def decoder(self) -> dict[int, str]:
        return self.inv_vocab

    def tokenize(self, text: str, **kwargs: Any) -> list[int]:
        """Ids of ``text``; ``kwargs`` go to the call of the ``transformers`` tokenizer."""
        if self._fast is not None and not kwargs:
            return self._fast.encode(text)
        return self._encode(text, **kwargs)

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encode(list(texts)) if texts else []

    def tokenize_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._fast.encode_flat(texts) if self._fast else super().tokenize_flat(texts)

    def _encode(self, text: str | list[str], **kwargs: Any) -> Any:
        try:
            # Not verbose: a document longer than a model's context is no reason for a warning here.
            return self._tokenizer(text, **{"verbose": False, **kwargs})["input_ids"]
        except (TypeError, ValueError, UnicodeEncodeError):
            refuse_lone_surrogates([text] if isinstance(text, str) else text)
            raise

    def detokenize(self, token_ids: Iterable[int], **kwargs: Any) -> str:
        """Text of ids; ``kwargs`` go to ``decode`` of the ``transformers`` tokenizer."""
        return self._tokenizer.decode([int(index) for index in token_ids], **kwargs)

    def offsets(self, ids: list[int], text: str) -> list[int]:
        """Where each token of ``text`` begins, in characters; added special tokens begin at 0.

        Raises:
            DataError: ``ids`` are not the ids of ``text``, or the tokenizer cannot tell.
        """
        if not getattr(self._tokenizer, "is_fast", False):
            raise DataError(f"the tokenizer {self._source} does not know offsets: it has no tokenizer.json")
        encoding = self._tokenizer(text, return_offsets_mapping=True, verbose=False)
        if list(encoding["input_ids"]) != [int(index) for index in ids]:
            raise DataError(
                "offsets: the ids are not those of the text; give the ids that tokenize(text) returned"
            )
        return [start for start, _ in encoding["offset_mapping"]]

    @property
    def eod(self) -> int:
        index = self._tokenizer.eos_token_id
        if index is None:
            raise MissingTokenError(
                f"the tokenizer {self._source} names no eos token, which ends documents; write "
                '"eos_token": "..." into the tokenizer_config.json beside its files'
            )
        return index


def _load(source: str, options: dict[str, Any]) -> tuple[Any, str | None]:
    """The ``transformers`` tokenizer of a directory, file or cached name, and a notice or None."""
    path = Path(source)
    if path.is_dir():
        return _load_directory(source, options)
    if path.is_file() or path.suffix in (".json", ".model"):
        file = existing_file(source, FLAG, WANTED)
        if file.name == "tokenizer.json" and file.with_name("tokenizer_config.json").is_file():
            return _load_directory(str(file.parent), options)
        return _load_file(file)
    try:
        return need("transformers", f"the tokenizer {source}").AutoTokenizer.from_pretrained(
            source, local_files_only=True, **options
        ), None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{FLAG} {source}: neither a file or directory here nor a name in the local Hugging Face cache, "
            f"and nothing is downloaded; give {WANTED}"
        ) from error


def _load_directory(directory: str, options: dict[str, Any]) -> tuple[Any, str | None]:
    present = sorted(path.name for path in Path(directory).iterdir())
    if not any(name in TOKENIZER_FILES or name.endswith((".tiktoken", ".model")) for name in present):
        found = ", ".join(present[:5]) + (", ..." if len(present) > 5 else "") if present else "nothing"
        raise DataError(
            f"{FLAG} {directory}: no tokenizer files in this directory, which holds {found}; give {WANTED}"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name in present:
            read_json(existing_file(str(Path(directory, name)), FLAG, WANTED), FLAG, WANTED)
    if "tokenizer.json" not in present and _is_sentence_piece(Path(directory, "tokenizer.model")):
        # Without them transformers misreads the file, and its error names neither.
        need("sentencepiece", f"the tokenizer {directory}")
        need("google.protobuf", f"the tokenizer {directory}", "protobuf")
    transformers = need("transformers", f"the tokenizer {directory}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, **options)
    except Exception as error:  # the library raises bare Exception for what its Rust part refuses
        raise DataError(
            f"{FLAG} {directory}: transformers cannot load a tokenizer from it "
            f"({_first_line(error)}); give {WANTED}"
        ) from error
    return tokenizer, _sentence_piece_notice(tokenizer, Path(directory))


def _load_file(file: Path) -> tuple[Any, str | None]:
    """Load a ``tokenizer.json`` alone, which does not say which token ends a document."""
    if file.suffix == ".model":
        raise DataError(
            f"{FLAG} {file}: a model file alone is not for transformers; use --tokenizer-type "
            "GPTSentencePieceTokenizer for a SentencePiece model"
        )
    config = read_json(file, FLAG, WANTED)
    if not isinstance(config, dict) or "model" not in config:
        raise DataError(f'{FLAG} {file}: JSON, but not a tokenizer.json (no "model" in it); give {WANTED}')
    transformers = need("transformers", f"the tokenizer {file}")
    try:
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file))
    except Exception as error:  # see _load_directory
        raise DataError(
            f"{FLAG} {file}: not a tokenizer.json that tokenizers can load ({_first_line(error)}); "
            f"give {WANTED}"
        ) from error
    vocabulary = tokenizer.get_vocab()
    end = next((token for token in END_TOKENS if token in vocabulary), None)
    if end is None:
        return tokenizer, None
    tokenizer.eos_token = end
    return tokenizer, f"{file.name} does not say which token ends a document; taking {end}"


def _sentence_piece_notice(tokenizer: Any, directory: Path) -> str | None:
    """A notice if ``transformers`` read a lone SentencePiece model and gives other ids than sentencepiece."""
    model = directory / "tokenizer.model"
    if not _is_sentence_piece(model) or (directory / "tokenizer.json").is_file():
        return None
    processor = load_sentence_piece(str(model))
    # Blanks in front and the text of special tokens are left out: there the two differ by choice.
    special = tokenizer.all_special_tokens
    probes = [probe.strip() for probe in PROBES if not any(token in probe for token in special)]
    for probe in filter(None, probes):
        pieces = processor.encode(probe, out_type=int)
        ids = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        if ids != pieces:
            return (
                f"transformers and sentencepiece read {model.name} differently, first at {probe[:30]!r}; ids "
                "are those of transformers. --tokenizer-type GPTSentencePieceTokenizer gives the other ones"
            )
    return None


def _is_sentence_piece(file: Path) -> bool:
    """Whether the file begins like a SentencePiece model: with its first piece. tiktoken's are text."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(1) == b"\n"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
