"""Tokenizers, built from the files of other programs."""

from megatron.training.tokenizer.build import _vocab_size_with_padding, build_tokenizer, num_token_ids

__all__ = ["_vocab_size_with_padding", "build_tokenizer", "num_token_ids"]
