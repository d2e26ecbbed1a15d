"""Rules about data, tokenizers, logging, profiling and the environment of a run."""

import os
import re
from argparse import Namespace
from collections.abc import Collection

from megatron.core.errors import ConfigError
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


def seed_fits_generators(args: Namespace, given: Collection[str]) -> list[Problem]:
    """NumPy takes seeds of 32 bits, and ranks add their places to the seed."""
    most = 2**32 - 1 - 100 * (args.pipeline_model_parallel_size - 1)
    if args.data_parallel_random_init:
        most -= 10 * (args.data_parallel_size - 1)
    if args.seed <= most:
        return []
    rule = f"must be at most {most}, so that every rank's seed fits 32 bits"
    return [Problem("--seed", args.seed, rule, "for example --seed 1234")]


def disabled_overrides_exist(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Kernels that are put aside exist under the names given."""
    names = args.disable_override
    if names is None:
        return []
    flag, example = "--disable-override", "for example --disable-override rms_norm"
    if not names:
        return [Problem(flag, None, "names no kernel", f"name one or several, {example}")]
    from megatron.core import overrides

    problems = []
    for name in names:
        rule = overrides.problem_with_name(name)
        if rule:
            problems.append(Problem(flag, name, rule, "python -m megatron_npu lists them"))
    return problems


def profile_has_a_range(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Profiling ends after it begins."""
    start, end = args.profile_step_start, args.profile_step_end
    if args.profile and end < start:
        rule = f"is before --profile-step-start {start}"
        return [Problem("--profile-step-end", end, rule, f"use --profile-step-end {start + 2}")]
    return []


def buffer_sizes_name_groups(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Sizes of communication buffers are numbers of MB behind names of groups."""
    from megatron.training.buffer_sizes import buffer_size_problem

    rule = buffer_size_problem(args.hccl_group_buffer or "")
    return (
        [Problem("--hccl-group-buffer", args.hccl_group_buffer, rule, "write 'dp:400;tp:300'")]
        if rule
        else []
    )


def nccl_settings_are_readable(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Settings of NCCL's groups can be read where they are used."""
    path = args.nccl_communicator_config_path
    if path is None:
        return []
    from megatron.core import accelerator
    from megatron.core.process_groups import load_nccl_settings

    if accelerator.collective_backend(args.distributed_backend) != "nccl":
        return []
    try:
        load_nccl_settings(path)
    except ConfigError as error:
        return [Problem("--nccl-communicator-config-path", path, str(error), "name a YAML file of settings")]
    return []


def rejected_results_are_readable(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The file of rejected results is absent, or one that can be read."""
    path = args.result_rejected_tracker_filename
    if path is None:
        return []
    from megatron.core.rerun_state_machine import RerunStateMachine

    try:
        RerunStateMachine.get_skipped_iterations_from_tracker_file(path)
    except (OSError, ValueError) as error:
        rule = f"cannot be read: {error}"
        return [Problem("--result-rejected-tracker-filename", path, rule, "name another file")]
    return []


def inference_threshold(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The threshold splits a batch over pipeline stages."""
    threshold = args.inference_batch_times_seqlen_threshold
    if threshold > -1 and args.pipeline_model_parallel_size == 1:
        flag = "--inference-batch-times-seqlen-threshold"
        return [Problem(flag, threshold, "needs several pipeline stages", "leave it out")]
    return []


def launcher_environment(args: Namespace, given: Collection[str]) -> list[Problem]:
    """The launcher's variables are numbers, and the rank lies in the world."""
    problems = []
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        word = os.environ.get(variable)
        if word and not word.isdigit():
            rule = "the environment variable is not a whole number"
            problems.append(Problem(variable, word, rule, "start through torchrun, or unset it"))
    meeting_place = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    if args.world_size > 1 and not meeting_place and not _met_already():
        rule = "MASTER_ADDR and MASTER_PORT do not say where the ranks meet"
        remedy = "start through torchrun, or set both to an address and a free port of the host of rank 0"
        problems.append(Problem("WORLD_SIZE", args.world_size, rule, remedy))
    if args.world_size < 1 or args.rank >= max(1, args.world_size):
        rule = f"lies outside a world of {args.world_size}"
        problems.append(
            Problem("RANK", args.rank, rule, "start through torchrun, or unset RANK and WORLD_SIZE")
        )
    return problems


def _met_already() -> bool:
    """The program that uses this library made the process groups."""
    from torch import distributed

    return distributed.is_initialized()


RULES = (
    one_source_of_data,
    paths_are_quoted,
    split_is_readable,
    tokenizer_has_its_files,
    seed_fits_generators,
    disabled_overrides_exist,
    profile_has_a_range,
    buffer_sizes_name_groups,
    nccl_settings_are_readable,
    rejected_results_are_readable,
    inference_threshold,
    launcher_environment,
)
