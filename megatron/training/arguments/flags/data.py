"""Datasets, loaders and tokenizers."""

from argparse import Namespace

from megatron.training.arguments.flag import (
    Group,
    NotBuilt,
    Refused,
    alike,
    at_least,
    off_switch,
    switch,
    unless,
    value,
    without,
)
from megatron.training.arguments.flags.shared import ENCODER_MODELS, OLDER_CLASSES


def _reads_files(args: Namespace) -> object:
    sources = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    return any(getattr(args, name) for name in sources) or args.per_split_data_args_path


WITH_MOCK_DATA = without("--data-path: mock data are made up, a third of them for each split", _reads_files)

DATA = Group(
    "data and dataloader",
    (
        value("--data-path", nargs="*", help="dataset prefix, list of prefixes, or weight/prefix pairs"),
        value("--split", no_effect=WITH_MOCK_DATA, help="train,valid,test proportions"),
        value("--train-data-path", nargs="*", help="separate training blend"),
        value("--valid-data-path", nargs="*", help="separate validation blend"),
        value("--test-data-path", nargs="*", help="separate test blend"),
        value("--data-args-path", help="file holding the --data-path words"),
        value("--per-split-data-args-path", help="JSON file with train/valid/test blends"),
        value("--data-cache-path", no_effect=WITH_MOCK_DATA, help="directory for index caches"),
        off_switch(
            "--no-mmap-bin-files",
            "mmap_bin_files",
            no_effect=WITH_MOCK_DATA,
            help="read .bin with file reads instead of mmap",
        ),
        switch("--mock-data", help="synthetic data"),
        value("--seq-length", type=int, bounds=at_least(1), most=2**31 - 1, help="tokens per sample"),
        value(
            "--encoder-seq-length",
            type=int,
            bounds=at_least(1),
            most=2**31 - 1,
            read="while the arguments are checked",
            help="encoder tokens (exclusive with --seq-length)",
        ),
        *alike(
            ENCODER_MODELS,
            value("--decoder-seq-length", type=int, help="decoder tokens"),
            value("--mask-prob", type=float, default=0.15, help="token masking probability (BERT/T5)"),
            value("--short-seq-prob", type=float, default=0.1, help="chance of a shorter sequence (BERT/T5)"),
        ),
        value(
            "--num-workers", type=int, default=2, bounds=at_least(0), most=1024, help="data loader processes"
        ),
        switch(
            "--reset-position-ids",
            no_effect=unless(
                lambda a: a.position_embedding_type == "learned_absolute",
                "this --position-embedding-type takes no position ids",
            ),
            help="restart positions after end-of-document",
        ),
        switch(
            "--reset-attention-mask",
            no_effect=unless(
                lambda a: a.create_attention_mask_in_dataloader,
                "--no-create-attention-mask-in-dataloader leaves the mask out",
            ),
            help="block attention across documents",
        ),
        switch("--eod-mask-loss", help="no loss where the input is an end-of-document token"),
        off_switch(
            "--no-create-attention-mask-in-dataloader",
            "create_attention_mask_in_dataloader",
            no_effect=unless(
                lambda a: a.reset_attention_mask,
                "without --reset-attention-mask no mask is built: attention is causal by itself",
            ),
            help="do not build the mask tensor",
        ),
        value(
            "--num-dataset-builder-threads",
            type=int,
            default=1,
            bounds=at_least(1),
            most=1024,
            no_effect=WITH_MOCK_DATA,
            help="threads building blended datasets",
        ),
        value(
            "--s3-cache-path",
            status=NotBuilt("index files in object storage", "copy the data to a local disk"),
            help="cache for S3 index files",
        ),
        off_switch(
            "--no-data-sharding",
            "data_sharding",
            no_effect=without("--dataloader-type cyclic"),
            help="cyclic loader: shuffle over all data instead of per-rank shard",
        ),
        value(
            "--data-impl",
            default="infer",
            choices=("lazy", "cached", "mmap", "infer"),
            status=OLDER_CLASSES,
            help="indexed dataset flavour",
        ),
        value(
            "--sample-rate",
            type=float,
            default=1.0,
            status=OLDER_CLASSES,
            help="fraction of training data for retrieval datasets",
        ),
    ),
)

TOKENIZER = Group(
    "tokenizer",
    (
        value(
            "--vocab-size",
            type=int,
            bounds=at_least(1),
            most=2**31 - 1,
            help="vocabulary size (Null and TikToken tokenizers)",
        ),
        value(
            "--vocab-file",
            no_effect=without(
                "--tokenizer-type GPT2BPETokenizer, BertWordPieceLowerCase or BertWordPieceCase",
                lambda a: (
                    a.tokenizer_type in ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase")
                ),
            ),
            help="vocabulary file",
        ),
        value("--merge-file", no_effect=without("--tokenizer-type GPT2BPETokenizer"), help="BPE merges file"),
        value(
            "--vocab-extra-ids",
            type=int,
            default=0,
            bounds=at_least(0),
            most=10**6,
            help="sentinel tokens for T5",
        ),
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
            status=Refused(
                "multimodal models are not part of this project",
                "use a text tokenizer such as HuggingFaceTokenizer",
                values=("MultimodalTokenizer", "NullMultimodalTokenizer"),
            ),
            help="tokenizer class",
        ),
        value(
            "--tokenizer-model",
            no_effect=unless(
                lambda a: (
                    a.tokenizer_type
                    not in (
                        "GPT2BPETokenizer",
                        "BertWordPieceLowerCase",
                        "BertWordPieceCase",
                        "NullTokenizer",
                    )
                ),
                "this --tokenizer-type has no model file",
            ),
            help="SentencePiece/HF/TikToken model path",
        ),
        value(
            "--tiktoken-pattern",
            no_effect=without("--tokenizer-type TikTokenizer"),
            help="v1 or v2 split pattern",
        ),
        value(
            "--tiktoken-num-special-tokens",
            type=int,
            default=1000,
            bounds=at_least(0),
            most=10**6,
            no_effect=without("--tokenizer-type TikTokenizer"),
            help="reserved special ids",
        ),
        value(
            "--tiktoken-special-tokens",
            nargs="+",
            no_effect=without("--tokenizer-type TikTokenizer"),
            help="names of special tokens",
        ),
        value(
            "--tokenizer-name-or-path",
            no_effect=without("--tokenizer-type PretrainedFromHF"),
            help="HF tokenizer name or directory",
        ),
    ),
)
