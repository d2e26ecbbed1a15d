"""The command line of ``tools/preprocess_data.py``: Megatron's flags and its forks'."""

import argparse
import os

from megatron.core.errors import ConfigError
from megatron.training.arguments.flags.data import TOKENIZER as TOKENIZER_FLAGS

# What build_tokenizer reads beyond the flags here. Sentinel ids belong to training, not to the data.
_FIXED = {
    "rank": 0,
    "make_vocab_size_divisible_by": 128,
    "tensor_model_parallel_size": 1,
    "vocab_extra_ids": 0,
}
_DEFAULT_HANDLER = "GeneralPretrainHandler"


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read and check the command line (abbreviated flags are allowed, as in Megatron's tool).

    Returns:
        The arguments, and a line for each flag that changes nothing here or looks forgotten.

    Raises:
        ConfigError: flags that do not go together; all problems in one message.
        SystemExit: status 2, from argparse, for a flag that does not exist or a value of the wrong kind.
    """
    args = _parser().parse_args(argv)
    problems = _problems(args)
    if problems:
        raise ConfigError("\n       ".join(problems))
    notices = _notices(args)
    args.json_keys = list(dict.fromkeys(args.json_keys))
    args.workers = args.workers or _default_workers(args.partitions)
    for name, value in _FIXED.items():
        setattr(args, name, value)
    return args, notices


def _notices(args: argparse.Namespace) -> list[str]:
    lines = []
    if args.chunk_size is not None:
        lines.append(
            f"--chunk-size {args.chunk_size} has no effect: workers are handed blocks of about 1 MiB"
        )
    if (args.tokenizer_type or "").startswith("Bert") and not args.split_sentences:
        lines.append("a Bert tokenizer without --split-sentences: BERT samples are made of sentences")
    if args.vocab_extra_ids:
        lines.append(f"--vocab-extra-ids {args.vocab_extra_ids} has no effect: data hold no sentinel ids")
    if args.keep_newlines and not args.split_sentences:
        lines.append("--keep-newlines has no effect without --split-sentences")
    return lines


def _problems(args: argparse.Namespace) -> list[str]:
    problems = []
    if args.workers is not None and args.workers % args.partitions:
        fitting = -(-args.workers // args.partitions) * args.partitions
        problems.append(
            f"--workers {args.workers} cannot be shared out among --partitions {args.partitions}: "
            f"give a multiple of it, such as --workers {fitting}"
        )
    if args.handler_name not in ("", _DEFAULT_HANDLER):
        problems.append(
            f"--handler-name {args.handler_name}: only {_DEFAULT_HANDLER} is built, which takes the text "
            "under --json-keys as it is; leave the flag out"
        )
    if args.dataset_impl != "mmap":
        problems.append(
            f"--dataset-impl {args.dataset_impl}: only mmap (.bin/.idx) is written; leave the flag out"
        )
    if args.tokenizer_type is None:
        problems.append(
            "--tokenizer-type is missing: give one, such as GPT2BPETokenizer with its --vocab-file"
        )
    return problems


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Tokenize text into the .bin/.idx files that training reads.",
    )
    group = parser.add_argument_group("input data")
    group.add_argument(
        "--input", nargs="+", required=True,
        help="JSON lines (.jsonl), .json (lines, an array or an object), also .gz or .zst, or .parquet; "
        "several files or quoted patterns are read in turn, the files of a pattern in order of name",
    )  # fmt: skip
    group.add_argument(
        "--json-keys", nargs="+", default=["text"], help="keys to take; each gets its own files"
    )
    group.add_argument(
        "--split-sentences", action="store_true", help="store each sentence as a sequence (NLTK)"
    )
    group.add_argument("--keep-newlines", action="store_true", help="keep the white space between sentences")
    group.add_argument("--lang", default="english", help="language of the sentences (a punkt model)")
    TOKENIZER_FLAGS.add_to(parser)
    group = parser.add_argument_group("output data")
    group.add_argument("--output-prefix", required=True, help="writes PREFIX_KEY_document.bin and .idx")
    group.add_argument("--append-eod", action="store_true", help="end every document with the EOD token")
    group = parser.add_argument_group("running")
    group.add_argument("--workers", type=_positive, help="worker processes; default one for each core")
    group.add_argument(
        "--partitions", type=_positive, default=1, help="deal the documents out to N parts, in turn"
    )
    group.add_argument(
        "--keep-sequential-samples", action="store_true", help="parts of neighbours: the order stays"
    )
    group.add_argument(
        "--log-interval", type=_positive, default=1000, help="documents between progress lines"
    )
    _add_dialect(parser)
    return parser


def _add_dialect(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("spellings of Megatron's forks")
    group.add_argument("--handler-name", default="", help=f"only {_DEFAULT_HANDLER}")
    group.add_argument("--dataset-impl", default="mmap", choices=["lazy", "cached", "mmap"], help="only mmap")
    group.add_argument("--chunk-size", type=_positive, help="accepted, without effect")
    group.add_argument("--vocab", dest="vocab_file", default=argparse.SUPPRESS, help="same as --vocab-file")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _default_workers(partitions: int) -> int:
    """One worker for each core this process may use, rounded to a multiple of the partitions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // partitions) * partitions
