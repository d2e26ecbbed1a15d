"""From arguments to a tokenizer: one row per ``--tokenizer-type``."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any

from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.training.tokenizer.files import required

if TYPE_CHECKING:
    from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer


def build_tokenizer(args: Namespace, **kwargs: Any) -> MegatronTokenizer:
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
            f"--tokenizer-type {name}: there is no such tokenizer; choose one of {', '.join(BUILDERS)}"
        )
    speaks = getattr(args, "rank", 0) == 0
    if speaks:
        print(f"> building {name} tokenizer ...", flush=True)
    tokenizer = builder(args, **kwargs)
    notice = getattr(tokenizer, "notice", None)
    if speaks and notice:
        print(f" > {notice}", flush=True)
    if getattr(args, "padded_vocab_size", None) is None:
        args.padded_vocab_size = _vocab_size_with_padding(_size_to_pad(tokenizer, args), args)
    return tokenizer


class UnknownTokenizerError(ConfigError, NotImplementedError):
    """A name that is no tokenizer type; scripts may expect NotImplementedError."""


def _vocab_size_with_padding(orig_vocab_size: int, args: Namespace, logging_enabled: bool = True) -> int:
    """``orig_vocab_size`` rounded up to a multiple of ``make_vocab_size_divisible_by`` x tensor-parallel size.

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


def _size_to_pad(tokenizer: MegatronTokenizer, args: Namespace) -> int:
    """The tokenizer's size, or ``--vocab-size`` where the tokenizer type does not use it for itself."""
    asked = getattr(args, "vocab_size", None)
    if asked is None or args.tokenizer_type in SIZED_BY_FLAG:
        return tokenizer.vocab_size
    if asked < tokenizer.vocab_size:
        raise ConfigError(
            f"--vocab-size {asked} is smaller than the {tokenizer.vocab_size} tokens of {args.tokenizer_type}; "
            f"give --vocab-size {tokenizer.vocab_size} or more, or leave it out"
        )
    return asked


# Each builder imports its module itself: one tokenizer's libraries are no price for another.


def _gpt2_bpe(args: Namespace) -> MegatronTokenizer:
    from megatron.training.tokenizer.gpt2_bpe import _GPT2BPETokenizer

    return _GPT2BPETokenizer(
        required(args.vocab_file, "--vocab-file", args.tokenizer_type),
        required(args.merge_file, "--merge-file", args.tokenizer_type),
    )


def _null(args: Namespace) -> MegatronTokenizer:
    from megatron.training.tokenizer.null import _NullTokenizer

    return _NullTokenizer(required(args.vocab_size, "--vocab-size", args.tokenizer_type))


def _multimodal(args: Namespace) -> MegatronTokenizer:
    raise NotBuiltYetError(
        "multimodal training", f"--tokenizer-type {args.tokenizer_type}", "Use a text tokenizer."
    )


BUILDERS: dict[str, Callable[..., MegatronTokenizer]] = {
    "GPT2BPETokenizer": _gpt2_bpe,
    "NullTokenizer": _null,
    "MultimodalTokenizer": _multimodal,
    "NullMultimodalTokenizer": _multimodal,
}

SIZED_BY_FLAG = frozenset({"NullTokenizer", "TikTokenizer"})
"""Types whose own size comes from ``--vocab-size``."""
