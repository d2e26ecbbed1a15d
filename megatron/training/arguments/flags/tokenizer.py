"""Tokenizer and vocabulary."""

from megatron.training.arguments.flag import Group, value

GROUP = Group(
    "tokenizer",
    (
        value("--vocab-size", type=int, help="vocabulary size (Null and TikToken tokenizers)"),
        value("--vocab-file", help="vocabulary file"),
        value("--merge-file", help="BPE merges file"),
        value("--vocab-extra-ids", type=int, default=0, help="sentinel tokens for T5"),
        value(
            "--tokenizer-type",
            choices=(
                "BertWordPieceLowerCase",
                "BertWordPieceCase",
                "GPT2BPETokenizer",
                "SentencePieceTokenizer",
                "GPTSentencePieceTokenizer",
                "HuggingFaceTokenizer",
                "Llama2Tokenizer",
                "TikTokenizer",
                "MultimodalTokenizer",
                "NullTokenizer",
                "NullMultimodalTokenizer",
                "PretrainedFromHF",
            ),
            help="tokenizer class",
        ),
        value("--tokenizer-model", help="SentencePiece/HF/TikToken model path"),
        value("--tiktoken-pattern", help="v1 or v2 split pattern"),
        value("--tiktoken-num-special-tokens", type=int, default=1000, help="reserved special ids"),
        value("--tiktoken-special-tokens", nargs="+", help="names of special tokens"),
        value("--tokenizer-name-or-path", help="HF tokenizer name or directory"),
    ),
)
