"""The tokenizers by the names that scripts import."""

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.training.tokenizer.build import _vocab_size_with_padding, build_tokenizer
from megatron.training.tokenizer.gpt2_bpe import _GPT2BPETokenizer
from megatron.training.tokenizer.null import _NullMultimodalTokenizer, _NullTokenizer

__all__ = [
    "MegatronTokenizer",
    "_GPT2BPETokenizer",
    "_NullMultimodalTokenizer",
    "_NullTokenizer",
    "_vocab_size_with_padding",
    "build_tokenizer",
]
