"""Building the tokenizer that the arguments name: one row per ``--tokenizer-type``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.training.tokenizer.base import lone_sentence_piece_model, required

if TYPE_CHECKING:
    from megatron.training.tokenizer.base import BatchTokenizer


def build_tokenizer(args: Namespace, **kwargs: Any) -> BatchTokenizer:
    """The tokenizer that ``args.tokenizer_type`` names; sets ``args.padded_vocab_size`` if it is missing.

    Args:
        args: read are ``rank``, ``tokenizer_type``, the flags of that type, ``make_vocab_size_divisible_by``,
            ``tensor_model_parallel_size`` and, where there is one, ``padded_vocab_size``.
        kwargs: handed to the Hugging Face loader.

    Raises:
        ConfigError: an unknown type, a missing flag, or a ``vocab_size`` smaller than the tokenizer.
        DataError: a tokenizer file that cannot be used.
    """
    name = args.tokenizer_type
    builder = BUILDERS.get(name)
    if builder is None:
        raise UnknownTokenizerError(
            f"--tokenizer-type {name}: there is no such tokenizer; choose one of "
            + ", ".join(name for name, make in BUILDERS.items() if make is not _multimodal)
        )
    if kwargs and name not in TAKES_LOADER_OPTIONS:
        raise ConfigError(
            f"{name} takes no options for a loader, but was given {', '.join(kwargs)}; leave them out"
        )
    is_rank_0 = getattr(args, "rank", 0) == 0
    if is_rank_0:
        print(f"> building {name} tokenizer ...", flush=True)
    tokenizer = builder(args, **kwargs)
    for line in _notices(tokenizer, args) if is_rank_0 else ():
        print(f" > {line}", flush=True)
    if getattr(args, "padded_vocab_size", None) is None:
        args.padded_vocab_size = _vocab_size_with_padding(_size_to_pad(tokenizer, args), args)
    return tokenizer


def _notices(tokenizer: BatchTokenizer, args: Namespace) -> list[str]:
    """Lines to print about the tokenizer just built."""
    lines = [tokenizer.notice] if tokenizer.notice else []
    if _extra_ids(args) and args.tokenizer_type not in TAKES_SENTINELS:
        lines.append(f"--vocab-extra-ids {_extra_ids(args)} has no effect on {args.tokenizer_type}")
    return lines


class UnknownTokenizerError(ConfigError, NotImplementedError):
    """A name that is no tokenizer type; scripts may expect NotImplementedError."""


def _vocab_size_with_padding(orig_vocab_size: int, args: Namespace, logging_enabled: bool = True) -> int:
    """Round up to a multiple of ``make_vocab_size_divisible_by`` x tensor-parallel size.

    Rank 0 prints both sizes if ``logging_enabled``.
    """
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    padded = ceil(orig_vocab_size / multiple) * multiple
    if logging_enabled and getattr(args, "rank", 0) == 0:
        print(
            f" > padded vocab (size: {orig_vocab_size}) with {padded - orig_vocab_size} dummy tokens "
            f"(new size: {padded})",
            flush=True,
        )
    return padded


def _size_to_pad(tokenizer: BatchTokenizer, args: Namespace) -> int:
    """The tokenizer's size, or ``--vocab-size`` where the tokenizer type does not use it for itself."""
    asked = getattr(args, "vocab_size", None)
    if asked is None or args.tokenizer_type in SIZED_BY_FLAG:
        return tokenizer.vocab_size
    if asked < tokenizer.vocab_size:
        raise ConfigError(
            f"--vocab-size {asked} is smaller than the {tokenizer.vocab_size} tokens of "
            f"{args.tokenizer_type}; give --vocab-size {tokenizer.vocab_size} or more, or leave it out"
        )
    return asked


def num_token_ids(tokenizer: BatchTokenizer, args: Namespace) -> int:
    """Number of ids that may stand for something: the tokenizer's, and those that ``--vocab-size`` adds.

    Ids from here up to ``args.padded_vocab_size`` only pad the embedding table.
    """
    asked = getattr(args, "vocab_size", None)
    size = tokenizer.vocab_size
    if asked is not None and args.tokenizer_type not in SIZED_BY_FLAG:
        size = max(size, asked)
    return min(size, args.padded_vocab_size)


# Each builder imports its module itself, so that no tokenizer loads the libraries of another.


def _gpt2_bpe(args: Namespace) -> BatchTokenizer:
    from megatron.training.tokenizer.gpt2_tokenization import _GPT2BPETokenizer

    name = args.tokenizer_type
    return _GPT2BPETokenizer(
        required(args.vocab_file, "--vocab-file", name), required(args.merge_file, "--merge-file", name)
    )


def _bert_word_piece(args: Namespace) -> BatchTokenizer:
    from megatron.training.tokenizer.bert_tokenization import _BertWordPieceTokenizer

    return _BertWordPieceTokenizer(
        required(args.vocab_file, "--vocab-file", args.tokenizer_type),
        lower_case=args.tokenizer_type == "BertWordPieceLowerCase",
        vocab_extra_ids=_extra_ids(args),
    )


def _sentence_piece(args: Namespace) -> BatchTokenizer:
    from megatron.training.tokenizer.sentence_piece import _SentencePieceTokenizer

    model = required(args.tokenizer_model, "--tokenizer-model", args.tokenizer_type)
    return _SentencePieceTokenizer(model, vocab_extra_ids=_extra_ids(args))


def _gpt_sentence_piece(args: Namespace) -> BatchTokenizer:
    from megatron.training.tokenizer.sentence_piece import _GPTSentencePieceTokenizer

    return _GPTSentencePieceTokenizer(
        required(args.tokenizer_model, "--tokenizer-model", args.tokenizer_type)
    )


def _llama2(args: Namespace) -> BatchTokenizer:
    from megatron.training.tokenizer.sentence_piece import _Llama2Tokenizer

    return _Llama2Tokenizer(required(args.tokenizer_model, "--tokenizer-model", args.tokenizer_type))


def _hugging_face(args: Namespace, **kwargs: Any) -> BatchTokenizer:
    """A SentencePiece model that comes alone is read by sentencepiece; anything else by transformers."""
    given = getattr(args, "tokenizer_name_or_path", None) or getattr(args, "tokenizer_model", None)
    flag = "--tokenizer-name-or-path" if args.tokenizer_type == "PretrainedFromHF" else "--tokenizer-model"
    source = required(given, flag, args.tokenizer_type)
    model = lone_sentence_piece_model(source)
    if model is not None:
        from megatron.training.tokenizer.sentence_piece import _GPTSentencePieceTokenizer

        tokenizer = _GPTSentencePieceTokenizer(model)
        tokenizer.notice = (
            f"{model} has no tokenizer_config.json beside it; ids are those of sentencepiece, no bos"
        )
        return tokenizer
    from megatron.training.tokenizer.hugging_face import _HuggingFaceTokenizer

    return _HuggingFaceTokenizer(source, **kwargs)


def _tik(args: Namespace) -> BatchTokenizer:
    from megatron.training.tokenizer.tik import PATTERNS, CustomTikTokenizer

    model = required(args.tokenizer_model, "--tokenizer-model", args.tokenizer_type)
    version = required(args.tiktoken_pattern, "--tiktoken-pattern", args.tokenizer_type, "v1 or v2")
    if version not in PATTERNS:
        raise ConfigError(f"--tiktoken-pattern {version}: there is no such pattern; give v1 or v2")
    return CustomTikTokenizer(
        model,
        PATTERNS[version],
        vocab_size=args.vocab_size,
        num_special_tokens=getattr(args, "tiktoken_num_special_tokens", 1000),
        special_tokens=getattr(args, "tiktoken_special_tokens", None),
    )


def _null(args: Namespace) -> BatchTokenizer:
    from megatron.training.tokenizer.null import _NullTokenizer

    return _NullTokenizer(required(args.vocab_size, "--vocab-size", args.tokenizer_type, "N"))


def _multimodal(args: Namespace) -> BatchTokenizer:
    raise NotBuiltYetError(
        "multimodal training", f"--tokenizer-type {args.tokenizer_type}", "Use a text tokenizer."
    )


def _extra_ids(args: Namespace) -> int:
    return getattr(args, "vocab_extra_ids", None) or 0


BUILDERS: dict[str, Callable[..., BatchTokenizer]] = {
    "BertWordPieceLowerCase": _bert_word_piece,
    "BertWordPieceCase": _bert_word_piece,
    "GPT2BPETokenizer": _gpt2_bpe,
    "SentencePieceTokenizer": _sentence_piece,
    "GPTSentencePieceTokenizer": _gpt_sentence_piece,
    "HuggingFaceTokenizer": _hugging_face,
    "PretrainedFromHF": _hugging_face,
    "Llama2Tokenizer": _llama2,
    "TikTokenizer": _tik,
    "NullTokenizer": _null,
    "MultimodalTokenizer": _multimodal,
    "NullMultimodalTokenizer": _multimodal,
}

SIZED_BY_FLAG = frozenset({"NullTokenizer", "TikTokenizer"})
"""Types whose own size comes from ``--vocab-size``."""

TAKES_SENTINELS = frozenset({"BertWordPieceLowerCase", "BertWordPieceCase", "SentencePieceTokenizer"})
"""Types that ``--vocab-extra-ids`` adds tokens to."""

TAKES_LOADER_OPTIONS = frozenset({"HuggingFaceTokenizer", "PretrainedFromHF"})
"""Types that hand ``build_tokenizer``'s keyword arguments on to the library's loader."""
