"""Random mixes of flags on top of a small run: drawn from a seed, run in this process, and judged.

A mix must run a step with a finite loss, or be refused soon, without a traceback, by a text that contains one
of its flags as it was typed.
"""

import contextlib
import io
import math
import multiprocessing
import os
import random
import re
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from megatron.training.arguments.flag import Flag
from megatron.training.arguments.flags import ALL_FLAGS

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
BASE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 32 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 1 --lr 1e-3 --tokenizer-type NullTokenizer "
    "--vocab-size 500 --eval-iters 1 --num-workers 0 --log-interval 1 --exit-interval 1 "
    "--transformer-impl local "
    f"--data-path {GOLDEN / 'data' / 'u16_text_document'} --split 90,8,2 --data-cache-path ../cache"
)
LAYOUTS = (
    "",
    "--tensor-model-parallel-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel",
    "--pipeline-model-parallel-size 2",
    "--context-parallel-size 2",
    "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
)
# More CPU seconds than a refusal may take. Imports are not part of it, waiting for other processes neither.
REFUSAL_S = 1.0

BUILT = tuple(flag for flag in ALL_FLAGS if flag.works)
ACCEPTED = tuple(flag for flag in ALL_FLAGS if flag.notice)

PLAIN_INTS = ("1", "2", "3", "4", "8", "16", "64")
EDGE_INTS = (
    "0",
    "-1",
    "7",
    "2147483647",
    "4294967296",
    "1000000000000",
    "9223372036854775807",
    "10000000000000000000000",
)
ODD_INTS = ("1.5", "1e3", "nan", "", " ", "three", "0x10", "1,2", "-", "None", "\uff11")
PLAIN_FLOATS = ("0.1", "0.5", "1.0", "1e-5", "2", "0.01")
EDGE_FLOATS = ("0", "-0.5", "1", "1e-30", "1e30", "nan", "inf", "-inf", "1e400")
ODD_FLOATS = ("abc", "", "1,5", "1/2", "None", "--1")
TEXTS = (
    "word",
    "a b",
    "",
    "missing/path",
    ".",
    "file.txt",
    "1",
    "0.5",
    "dp:4",
    "fp16",
    "none",
    "gelu,rotary",
    "a=b",
    "ä",
    "/",
)


# Values that make sense in a small run, for flags that are particular about them.
GOOD = {
    **dict.fromkeys(("--num-layers", "--encoder-num-layers"), ("2", "4", "8")),
    **dict.fromkeys(("--hidden-size", "--ffn-hidden-size"), ("32", "64")),
    **dict.fromkeys(("--seq-length", "--encoder-seq-length"), ("16", "8")),
    **dict.fromkeys(("--num-attention-heads", "--num-query-groups"), ("2", "4")),
    **dict.fromkeys(
        ("--lr", "--min-lr", "--decoupled-lr", "--decoupled-min-lr", "--lr-warmup-init"), ("1e-4",)
    ),
    **dict.fromkeys(
        ("--attention-dropout", "--hidden-dropout", "--adam-beta1", "--adam-beta2"), ("0.1", "0")
    ),
    **dict.fromkeys(
        ("--save", "--load", "--pretrained-checkpoint", "--profile", "--tensorboard-dir"), ("out",)
    ),
    **dict.fromkeys(("--config-logger-dir", "--data-cache-path"), ("logs",)),
    **dict.fromkeys(("--train-data-path", "--valid-data-path", "--test-data-path"), ("missing/path",)),
    **dict.fromkeys(
        (
            "--tensor-model-parallel-size",
            "--pipeline-model-parallel-size",
            "--context-parallel-size",
            "--expert-model-parallel-size",
            "--expert-tensor-parallel-size",
            "--hierarchical-context-parallel-sizes",
            "--ulysses-degree-in-cp",
        ),
        ("1",),
    ),
    "--max-position-embeddings": ("32", "64"),
    "--micro-batch-size": ("1", "2", "4"),
    "--global-batch-size": ("4", "8"),
    "--rampup-batch-size": ("4 4 16",),
    "--kv-channels": ("8", "16"),
    "--num-workers": ("0", "1"),
    "--spec": ("local", "megatron.core.models.gpt.gpt_layer_specs get_gpt_layer_local_spec"),
    "--split": ("8,1,1", "100", "0.5,0.5"),
    "--recompute-modules": ("mlp", "core_attn layernorm"),
    "--cp-comm-type": ("a2a", "p2p"),
    "--disable-override": ("swiglu", "rms_norm,rotary"),
    "--hccl-group-buffer": ("dp:4", "dp:4;tp:8"),
    "--tokenizer-type": ("NullTokenizer",),
    "--vocab-size": ("600", "1000"),
    "--data-path": (str(GOLDEN / "data" / "u16_text_document"),),
    "--result-rejected-tracker-filename": ("tracker",),
    "--ckpt-format": ("torch",),
    "--position-embedding-type": ("rope", "none", "learned_absolute"),
    "--log-arguments": ("all", "none"),
    "--yaml-cfg": ("missing.yaml",),
    "--tiktoken-pattern": ("v1", "v2"),
}


# What a flag needs beside it.
COMPANIONS = {
    "--save": "--save-interval 1",
    "--no-initialization": "--pretrained-checkpoint out",
    "--use-checkpoint-args": "--load out",
    "--tp-comm-overlap": "--sequence-parallel",
    "--recompute-granularity": "--recompute-granularity full --recompute-method uniform",
    "--recompute-method": "--recompute-granularity full",
    "--recompute-num-layers": "--recompute-granularity full --recompute-method block",
    "--use-fused-rmsnorm": "--normalization RMSNorm",
    "--use-fused-swiglu": "--swiglu",
    "--use-fused-rotary-pos-emb": "--position-embedding-type rope",
    "--rotary-interleaved": "--no-rope-fusion",
    "--no-position-embedding": "--position-embedding-type rope",
    "--rotary-base": "--position-embedding-type rope",
    "--reuse-fp32-param": "--bf16",
    "--fp32-residual-connection": "--bf16",
    "--fp16-lm-cross-entropy": "--fp16",
    "--loss-scale": "--fp16",
    "--overlap-param-gather": "--use-distributed-optimizer --overlap-grad-reduce",
    "--weight-decay-incr-style": "--start-weight-decay 0.01 --end-weight-decay 0.1",
    "--lr-decay-style": "--lr-wsd-decay-iters 1",
    "--group-query-attention": "--num-query-groups 2",
    "--encoder-num-layers": "--encoder-num-layers 2 --num-layers 2",
    "--encoder-seq-length": "--encoder-seq-length 16 --seq-length 16",
    "--pre-tockens": "--attention-backend unfused",
}


@dataclass(frozen=True)
class Mix:
    """A command line of the fuzzer.

    Attributes:
        seed: draws it again.
        ranks: how many run it.
        words: beside ``BASE``.
    """

    seed: int
    ranks: int
    words: tuple[str, ...]

    @property
    def flags(self) -> set[str]:
        """Its flags as typed, without joined values."""
        return {word.partition("=")[0] for word in self.words if re.match(r"[-_]+[A-Za-z]", word)}

    @property
    def base(self) -> str:
        """``BASE``, for every other mix that names another source of data without its own."""
        if self.seed % 2 or not any(re.match("--.*(data-path|args-path|mock)", word) for word in self.words):
            return BASE
        return re.sub("--data-path [^ ]* --split [^ ]*", "", BASE).replace(
            "--vocab-size 500", "--vocab-size 5000"
        )

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.ranks} ranks: {' '.join(word or repr(word) for word in self.words)}"


@dataclass
class Outcome:
    """What became of a mix on one rank.

    Attributes:
        status: exit status of the program.
        losses: of every step made; None for a step that a loss scaler skipped.
        text: what was printed.
        error: what was printed of the error, without what came before.
        trace: the traceback, if the program ended with one.
        cpu_s: CPU seconds of the whole run.
    """

    status: int = 0
    losses: list[float | None] = field(default_factory=list)
    text: str = ""
    error: str = ""
    trace: str = ""
    cpu_s: float = 0.0


class Refused(Exception):
    """The error of one of several ranks, as its program would print it."""


def draw(seed: int) -> Mix:
    """The mix of ``seed``: 1 to 12 flags; half of the mixes have values that make sense one by one."""
    rng = random.Random(seed)
    tameness = rng.choice((0.6, 0.9, 1.0, 1.0))
    words: list[str] = []
    for _ in range(rng.randint(1, 12)):
        tiers = (BUILT, BUILT, BUILT, ACCEPTED, ALL_FLAGS if tameness < 1 else BUILT)
        flag = rng.choice(rng.choice(tiers))
        words += _spelled(rng, flag, tameness)
        words += COMPANIONS.get(flag.name, "").split() if rng.random() < tameness else []
    ranks = 2 if rng.random() < 0.1 else 1
    if ranks == 2:
        words += rng.choice(LAYOUTS).split()
    return Mix(seed, ranks, tuple(words))


def _spelled(rng: random.Random, flag: Flag, tameness: float) -> list[str]:
    """The flag with its values; at times misspelled, joined by "=", given twice, or with a wrong count."""
    name, values = rng.choice(flag.names), _values(rng, flag, tameness)
    if rng.random() > tameness:
        name = rng.choice((name[:-1], name.replace("-", "_"), name.upper(), name[1:], name + "s", name))
    if len(values) == 1 and rng.random() < 0.2:
        words = [f"{name}={values[0]}"]
    elif "action" in flag.options and rng.random() > max(tameness, 0.9):
        words = [f"{name}={rng.choice(('1', 'true', ''))}"]
    else:
        words = [name, *values]
    return words * 2 if rng.random() < 0.03 else words


def _values(rng: random.Random, flag: Flag, tameness: float) -> list[str]:
    options = flag.options
    if "action" in options:
        return []
    if flag.name in GOOD and rng.random() < tameness:
        return rng.choice(GOOD[flag.name]).split()
    count = 1
    if options.get("nargs"):
        count = 1 if tameness == 1 else rng.choice((0, 1, 2, 3, 5))
    elif rng.random() > max(tameness, 0.9):
        count = rng.choice((0, 2))
    return [_value(rng, options, tameness) for _ in range(count)]


def _value(rng: random.Random, options: dict[str, Any], tameness: float) -> str:
    choices = [str(choice) for choice in options.get("choices", ()) if choice is not None]
    kind = options.get("type")
    if choices:
        plain, edge, odd = choices, [choice.upper() for choice in choices], TEXTS
    elif kind is int:
        plain, edge, odd = PLAIN_INTS, EDGE_INTS, ODD_INTS
    elif kind is float:
        plain, edge, odd = PLAIN_FLOATS, EDGE_FLOATS, ODD_FLOATS
    else:
        plain, edge, odd = TEXTS, TEXTS, TEXTS
    if rng.random() < tameness:
        return rng.choice(edge if rng.random() < (0.03 if tameness == 1 else 0.2) else plain)
    return rng.choice(odd if rng.random() < 0.5 else edge)


def run_mix(mix: Mix, directory: str) -> Outcome:
    """Run ``pretrain_gpt.py`` with the mix on this rank, as its entry point would end it."""
    import pretrain_gpt

    outcome, output, errors = Outcome(), io.StringIO(), io.StringIO()
    os.chdir(directory)
    Path("file.txt").write_text("text")
    os.environ["MEGATRON_DEVICE"] = "cpu"
    sys.argv = ["pretrain_gpt.py", *mix.base.split(), *mix.words]
    # Ranks of the pool are daemons, which may have no children; loaders have workers.
    multiprocessing.current_process()._config["daemon"] = False
    started = time.process_time()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors), _counted(outcome):
            outcome.status, outcome.error = _ending(pretrain_gpt.main)
    except BaseException:
        outcome.status, outcome.trace = 1, traceback.format_exc()
    outcome.cpu_s = time.process_time() - started
    multiprocessing.current_process()._config["daemon"] = True
    outcome.text = output.getvalue()
    outcome.error += errors.getvalue()
    if mix.ranks > 1 and outcome.status and not outcome.trace and not outcome.losses:
        # A launch ends the other ranks when one fails; here the pool does, which must see a failure.
        raise Refused(outcome.error)
    return outcome


def _ending(main: Any) -> tuple[int, str]:
    """Exit status and message, as ``entry.run_main`` gives them."""
    from megatron.core.errors import MegatronError
    from megatron.training.arguments.spellings import with_flags

    try:
        main()
    except MegatronError as error:
        return getattr(error, "exit_status", 1), f"error: {with_flags(str(error))}"
    except SystemExit as end:
        return end.code or 0, ""
    return 0, ""


@contextlib.contextmanager
def _counted(outcome: Outcome):
    """Note the loss of every step."""
    from megatron.training import training

    step = training.train_step

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        outcome.losses.append(float(result[0]["lm loss"]) if result[0] else None)
        return result

    with mock.patch.object(training, "train_step", counted_step):
        yield


def fault(mix: Mix, outcome: Outcome, said: str) -> str | None:
    """What is wrong with the outcome of a mix on one rank; None if nothing is.

    Args:
        said: the error texts of all ranks; one of them speaks where all refuse the same.
    """
    if outcome.trace:
        return f"a traceback\n{outcome.trace[-1500:]}"
    if any(loss is not None and not math.isfinite(loss) for loss in outcome.losses[:1]):
        return f"the first loss is {outcome.losses[0]}"
    if outcome.status == 0 or outcome.losses:
        return None
    if not any(is_in(flag, said) for flag in mix.flags):
        return f"no flag is named by: {said[-1500:]!r}"
    if outcome.cpu_s > REFUSAL_S:
        return f"refused after {outcome.cpu_s:.1f} s of CPU time: {outcome.error[-300:]!r}"
    return None


def is_in(flag: str, text: str) -> bool:
    """Whether the text contains the flag as a whole word."""
    return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text) is not None
