"""Every fault of a command line is told in one go, with a way out and the right exit status."""

import os
import random
import subprocess
import sys

import pytest

from megatron.training.arguments import ArgumentsError
from megatron.training.arguments.flags import ALL_FLAGS
from megatron.training.arguments.parsing import build_parser
from megatron.training.arguments.scan import scan
from megatron.training.arguments.validation import find_problems

MODEL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32"
MODEL += " --micro-batch-size 2"
TRAINING = f"{MODEL} --train-iters 20 --lr 1e-3"

SCRIPT = """
import sys
from megatron.training.arguments import parse_args, validate_args
from megatron.training.entry import run_main
run_main(lambda: validate_args(parse_args(), {"tokenizer_type": "NullTokenizer"}))
import torch
assert not torch.distributed.is_initialized()
print("reached the end")
"""


def usage_error(parse, capsys, words, **options) -> str:
    """The message on stderr of a command line whose words cannot be used."""
    with pytest.raises(SystemExit) as stop:
        parse(words, **options)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    return captured.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--hiden-size 64", ["--hiden-size: no such flag", "did you mean --hidden-size?"]),
        ("--num_workers 2", ["--num_workers: no such flag", "did you mean --num-workers?"]),
        ("--untie-embeddings", ["did you mean --untie-embeddings-and-output-weights?"]),
        ("--DDP-Impl local", ["did you mean --DDP-impl?"]),
        ("--qqqqqqqqqq", ["no such flag", "see --help"]),
        ("--lr abc", ["--lr abc", "'abc' is not a number", "for example --lr 0.1"]),
        ("--num-layers 2.5", ["--num-layers 2.5", "not a whole number"]),
        ("--num-layers", ["--num-layers: needs a value", "for example --num-layers 1"]),
        ("--log-interval", ["--log-interval: needs a value", "for example --log-interval 100"]),
        ("--profile-ranks", ["--profile-ranks: needs a value"]),
        (
            "--lr-decay-style cosin",
            ["--lr-decay-style cosin", "not one of constant, linear", "did you mean cosine?"],
        ),
        (
            "--attention-backend flsh",
            ["not one of flash, fused, unfused, local, auto", "did you mean flash?"],
        ),
        ("--empty-unused-memory-level 3", ["not one of 0, 1, 2"]),
        ("--swiglu=1", ["--swiglu: is a switch", "write --swiglu alone"]),
        ("--bf16 yes", ["'yes': does not belong to --bf16"]),
        ("--moe-layer-freq [__import__('os')]", ["neither an integer nor a list"]),
        ("--lr -x", ["--lr: needs a value", "-x: no such flag"]),
    ],
)
def test_usage_error(words: str, parts: list[str], parse, capsys) -> None:
    message = usage_error(parse, capsys, words)
    assert all(part in message for part in parts), message
    assert message.count("\n") == message.count("\n  ") + 1


def test_words_before_the_first_flag(parse, capsys) -> None:
    assert "'stray': belongs to no flag" in usage_error(parse, capsys, "stray --bf16", base="")


def test_usage_errors_and_broken_rules_are_told_together(parse, capsys) -> None:
    words = (
        "--hiden-size 3 --lr-warmup-iters x --lr-decay-style cosin --min-lr 2 --fp16 --bf16 --save out "
        "--tensor-model-parallel-size 2 --global-batch-size 5 --batch-size 4 --train-samples 7"
    )
    message = usage_error(parse, capsys, words)
    assert message.startswith("error: 10 problems with the arguments\n")
    for flag in (
        "--hiden-size",
        "--lr-warmup-iters x",
        "--lr-decay-style cosin",
        "--min-lr 2",
        "--fp16",
        "--save out",
        "WORLD_SIZE 1",
        "--global-batch-size 5",
        "--batch-size 4",
        "--train-samples 7",
    ):
        assert f"\n  {flag}: " in message


def test_faults_do_not_cause_further_messages(parse, capsys) -> None:
    """A flag that could not be read counts neither as missing nor as its default."""
    message = usage_error(parse, capsys, MODEL.replace("--num-layers", "--num-layer").split(), base="")
    assert message == "error: --num-layer: no such flag; did you mean --num-layers?\n"
    message = usage_error(parse, capsys, TRAINING.replace("1e-3", "fast").split(), base="")
    assert message == "error: --lr fast: 'fast' is not a number; for example --lr 0.1\n"


def test_broken_rules_are_told_together(check) -> None:
    with pytest.raises(ArgumentsError) as error:
        check("--num-attention-heads 7 --seed 0 --min-lr 1 --lr-warmup-init 1 --weight-decay -1")
    message = str(error.value)
    assert error.value.exit_status == 1
    assert message.splitlines()[0] == "5 problems with the arguments"
    assert "--hidden-size 64: is not a multiple of --num-attention-heads 7" in message
    assert "use --hidden-size 70 or --num-attention-heads 8" in message


def test_missing_sizes_are_told_together(check) -> None:
    with pytest.raises(ArgumentsError) as error:
        check(base="")
    flags = [problem.flag for problem in error.value.problems]
    assert flags == [
        "--num-layers",
        "--hidden-size",
        "--num-attention-heads",
        "--seq-length",
        "--max-position-embeddings",
        "--micro-batch-size",
    ]


def test_unknown_flags_can_be_ignored(parse) -> None:
    args = parse("--not-ours 3 --bf16 --nor-this", ignore_unknown_args=True)
    assert args.bf16 and args.num_layers == 2


def test_flags_of_the_script(parse, capsys) -> None:
    def provider(parser):
        group = parser.add_argument_group("mine")
        group.add_argument("--my-number", type=int, required=True)
        group.add_argument("--my-pair", type=int, nargs=2)
        return parser

    args = parse("--my-number -3 --my-pair 1 2", extra_args_provider=provider)
    assert (args.my_number, args.my_pair) == (-3, [1, 2])
    message = usage_error(parse, capsys, "--my-pair 1", extra_args_provider=provider)
    assert "--my-number: is required" in message and "--my-pair: needs 2 values, got 1" in message


def test_lone_backslashes_are_dropped(parse, capsys) -> None:
    args = parse(["--fp16", "\\", "--ffn-hidden-size", "128", "\\ ", "--log-interval", "1"])
    assert (args.fp16, args.ffn_hidden_size, args.log_interval) == (True, 128, 1)
    assert capsys.readouterr().out.startswith("WARNING: dropped 2 lone backslash(es)")


@pytest.mark.parametrize(
    ("words", "dest", "value"),
    [
        (["--lr", "-1e-5"], "lr", -1e-5),
        (["--moe-layer-freq", "-1"], "moe_layer_freq", -1),
        (["--split=969, 30, 1"], "split", "969, 30, 1"),
        (["--split", "969, 30, 1"], "split", "969, 30, 1"),
        (["--data-path", "0.3", "a", "0.7", "b"], "data_path", ["0.3", "a", "0.7", "b"]),
        (["--data-path=one"], "data_path", ["one"]),
        (["--data-path"], "data_path", []),
        (["--tokenizer-model=a=b"], "tokenizer_model", "a=b"),
        (["--initial-loss-scale", "65536"], "initial_loss_scale", 65536.0),
        (["--persistent-save-interval", "5"], "save_interval", 5),
        (["--local_rank=0"], "local_rank", 0),
        (["--local-rank", "0"], "local_rank", 0),
        (["--onnx-safe", "no"], "onnx_safe", True),
        (["--num-layers", "3", "--num-layers", "4"], "num_layers", 4),
    ],
)
def test_value_is_parsed(words: list[str], dest: str, value: object, parse) -> None:
    assert getattr(parse(words), dest) == value


def test_environment(parse, check, monkeypatch) -> None:
    for name, word in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, word)
    args = parse()
    assert (args.rank, args.world_size, args.local_rank) == (3, 8, 2)
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ArgumentsError, match="RANK zero: the environment variable is not a whole number"):
        check()


def test_problems_are_told_in_the_spelling_that_was_typed(check) -> None:
    with pytest.raises(ArgumentsError) as caught:
        check("--persistent-save-interval 0")
    assert "--persistent-save-interval 0: " in str(caught.value)
    assert " --save-interval" not in str(caught.value)


@pytest.mark.parametrize("words", ["--num-layers", "--use-mcore-models", "--bf16 --num-layers 2"])
def test_one_word_of_a_shell_array_is_recognised(words: str) -> None:
    run = run_script(words)
    assert run.returncode and 'pass "${NAME[@]}"' in run.stderr


def test_a_complete_command_line_is_told_nothing_of_arrays() -> None:
    run = run_script(f"{TRAINING} --vocab-size 99 --lr -1 --hidden-size 0")
    assert run.returncode and "NAME[@]" not in run.stderr


def run_script(words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *words.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        (f"{TRAINING} --vocab-size 99", 0, []),
        (
            f"{TRAINING} --vocab-size 99 --hidden-sise 3 --min-lr 3",
            2,
            ["error: 2 problems", "--hidden-sise", "--min-lr 3"],
        ),
        (
            f"{TRAINING} --min-lr 3 --fp16 --bf16",
            1,
            ["error: 3 problems", "--vocab-size", "--min-lr 3", "--fp16"],
        ),
        (f"{TRAINING} --vocab-size 99 --checkpoint-activations", 1, ["error: --checkpoint-activations"]),
    ],
)
def test_exit_status(words: str, status: int, parts: list[str]) -> None:
    done = run_script(words)
    assert done.returncode == status, done.stderr
    assert ("reached the end" in done.stdout) == (status == 0)
    assert all(part in done.stderr for part in parts), done.stderr
    assert "Traceback" not in done.stderr
    if status:
        assert done.stdout == ""


WORDS = [
    "-1",
    "0",
    "1",
    "2",
    "7",
    "1e9",
    "nan",
    "inf",
    "-0.5",
    "0.5",
    "word",
    "",
    "[1]",
    "fp16",
    "none",
    "a b",
]


@pytest.mark.parametrize("seed", range(40))
def test_rules_never_fail_themselves(seed: int) -> None:
    """Any words at all give problems or none, never a traceback."""
    draw = random.Random(seed)
    parser = build_parser()
    for _ in range(5):
        words = MODEL.split() if draw.random() < 0.7 else []
        for flag in draw.sample(ALL_FLAGS, 25):
            choices = [str(choice) for choice in flag.options.get("choices", ())]
            values = [] if "action" in flag.options else [draw.choice(choices or WORDS)]
            words += [flag.name, *values]
        found = scan(parser, words)
        args = parser.parse_args(found.words)
        args.given_flags = tuple(found.given)
        problems = [*found.problems, *find_problems(args)]
        assert all(str(problem).startswith(problem.flag) for problem in problems)
