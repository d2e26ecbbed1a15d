"""The public names of the tokenizers."""

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.training.tokenizer.bert_tokenization import FullTokenizer as FullBertTokenizer
from megatron.training.tokenizer.bert_tokenization import _BertWordPieceTokenizer
from megatron.training.tokenizer.build import _vocab_size_with_padding, build_tokenizer
from megatron.training.tokenizer.gpt2_tokenization import GPT2Tokenizer, _GPT2BPETokenizer
from megatron.training.tokenizer.hugging_face import _HuggingFaceTokenizer
from megatron.training.tokenizer.null import _NullMultimodalTokenizer, _NullTokenizer
from megatron.training.tokenizer.sentence_piece import (
    _GPTSentencePieceTokenizer,
    _Llama2Tokenizer,
    _SentencePieceTokenizer,
)
from megatron.training.tokenizer.tik import (
    PATTERN_TIKTOKEN,
    PATTERN_TIKTOKEN_V2,
    CustomTikTokenizer,
    reload_mergeable_ranks,
)

__all__ = [
    "PATTERN_TIKTOKEN",
    "PATTERN_TIKTOKEN_V2",
    "CustomTikTokenizer",
    "FullBertTokenizer",
    "GPT2Tokenizer",
    "MegatronTokenizer",
    "_BertWordPieceTokenizer",
    "_GPT2BPETokenizer",
    "_GPTSentencePieceTokenizer",
    "_HuggingFaceTokenizer",
    "_Llama2Tokenizer",
    "_NullMultimodalTokenizer",
    "_NullTokenizer",
    "_SentencePieceTokenizer",
    "_vocab_size_with_padding",
    "build_tokenizer",
    "reload_mergeable_ranks",
]
