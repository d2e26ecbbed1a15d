"""Rules about data and tokenizers."""

import os
import re
from argparse import Namespace
from collections.abc import Collection

from megatron.training.arguments.problem import Problem

_WORD_PIECE = ("vocab_file",)
_MODEL = ("tokenizer_model",)
TOKENIZER_FILES: dict[str, tuple[str, ...]] = {
    "BertWordPieceLowerCase": _WORD_PIECE,
    "BertWordPieceCase": _WORD_PIECE,
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "SentencePieceTokenizer": _MODEL,
    "GPTSentencePieceTokenizer": _MODEL,
    "Llama2Tokenizer": _MODEL,
    "HuggingFaceTokenizer": _MODEL,
    "TikTokenizer": ("tokenizer_model", "tiktoken_pattern"),
    "NullTokenizer": ("vocab_size",),
}
EXAMPLE_VALUES = {"vocab_size": "4095", "tiktoken_pattern": "v2"}


def one_source_of_data(args: Namespace, given: Collection[str]) -> list[Problem]:
    """One way to name the data sets."""
    sources = {
        "--mock-data": args.mock_data,
        "--data-path": args.data_path,
        "--data-args-path": args.data_args_path,
        "--train-data-path, --valid-data-path or --test-data-path": (
            args.train_data_path or args.valid_data_path or args.test_data_path
        ),
        "--per-split-data-args-path": args.per_split_data_args_path,
    }
    asked = [flag for flag, on in sources.items() if on]
    if len(asked) > 1:
        return [Problem(asked[0], None, f"excludes {' and '.join(asked[1:])}", "keep one source of data")]
    return []


def paths_are_quoted(args: Namespace, given: Collection[str]) -> list[Problem]:
    """A path with a blank is one word, and a blend is several."""
    problems = []
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words = getattr(args, name) or []
        whole = " ".join(words)
        if len(words) > 1 and _is_data_set(whole) and not all(_is_data_set(word) for word in words):
            rule, remedy = "is one path with a blank", f'quote it: {_flag(name)} "{whole}"'
        elif len(words) == 1 and not _is_data_set(whole) and any(map(_is_data_set, whole.split()[1:])):
            rule, remedy = "is a blend in one word", f"leave the quotes out: {_flag(name)} {whole}"
        else:
            continue
        problems.append(Problem(_flag(name), words, rule, remedy))
    return problems


def _is_data_set(prefix: str) -> bool:
    return os.path.exists(f"{prefix}.bin") or os.path.exists(f"{prefix}.idx")


def split_is_readable(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Up to three shares of which one at least is positive; none with a blend per split."""
    if args.split is None:
        return []
    per_split = args.train_data_path or args.valid_data_path or args.test_data_path
    if per_split or args.per_split_data_args_path:
        rule = "has no meaning when every split has data of its own"
        return [Problem("--split", args.split, rule, "leave it out")]
    shares = re.findall(r"[.\d]+", args.split)
    try:
        numbers = [float(share) for share in shares]
    except ValueError:
        numbers = []
    if "-" in args.split or not 1 <= len(numbers) <= 3 or sum(numbers) <= 0:
        rule = "is not up to three shares for training, validation and test"
        return [Problem("--split", repr(args.split), rule, "for example --split 949,50,1")]
    return []


def tokenizer_has_its_files(args: Namespace, given: Collection[str]) -> list[Problem]:
    """What each kind of tokenizer is built from."""
    kind = args.tokenizer_type
    problems = []
    for name in TOKENIZER_FILES.get(kind, ()):
        if getattr(args, name) is not None:
            continue
        remedy = f"add {_flag(name)} {EXAMPLE_VALUES.get(name, 'PATH')}"
        if "--tokenizer-type" in given:
            problems.append(Problem("--tokenizer-type", kind, f"needs {_flag(name)}", remedy))
        else:
            rule = f"is required by {kind}, the tokenizer that is used where none is named"
            problems.append(Problem(_flag(name), None, rule, f"{remedy}, or name one with --tokenizer-type"))
    if kind == "PretrainedFromHF" and args.tokenizer_name_or_path is None and args.tokenizer_model is None:
        rule = "needs --tokenizer-name-or-path"
        problems.append(Problem("--tokenizer-type", kind, rule, "add --tokenizer-name-or-path DIR"))
    if args.tiktoken_pattern not in (None, "v1", "v2"):
        rule = "is not one of v1, v2"
        problems.append(
            Problem("--tiktoken-pattern", args.tiktoken_pattern, rule, "use --tiktoken-pattern v2")
        )
    return problems


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


RULES = (one_source_of_data, paths_are_quoted, split_is_readable, tokenizer_has_its_files)
