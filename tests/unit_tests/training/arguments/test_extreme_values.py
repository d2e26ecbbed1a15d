"""Values at and beyond the ends of what a number may be: refused by name, before anything is allocated."""

from argparse import Namespace

import pytest

from megatron.core import accelerator
from megatron.core.errors import ConfigError
from megatron.training import memory_limits
from megatron.training.arguments import ArgumentsError
from megatron.training.arguments.flag import MOST
from megatron.training.arguments.flags import ALL_FLAGS
from megatron.training.model_setup import ddp_config_from_args, spec_by_name

NUMBERS = [
    flag
    for flag in ALL_FLAGS
    if flag.works and flag.options.get("type") in (int, float) and "nargs" not in flag.options
]
# Numbers that other rules check, or for which any number makes sense.
UNBOUNDED = {
    "--logging-level",
    "--expert-tensor-parallel-size",
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
    "--microbatch-group-size-per-virtual-pipeline-stage",
    "--decoder-first-pipeline-num-layers",
    "--decoder-last-pipeline-num-layers",
    "--ulysses-degree-in-cp",
}
# Flags of which a million millions could be counted up to: with that value each must be refused at once.
COUNTED = [flag for flag in ALL_FLAGS if flag.most < MOST]


def problems_of(check, words: str) -> list[str]:
    with pytest.raises(ArgumentsError) as error:
        check(words)
    return [str(problem) for problem in error.value.problems]


def test_every_number_has_a_range() -> None:
    bounded = {flag.name for flag in NUMBERS if flag.bounds}
    with_choices = {flag.name for flag in NUMBERS if "choices" in flag.options}
    assert {flag.name for flag in NUMBERS} - bounded - with_choices == UNBOUNDED


@pytest.mark.parametrize(
    "flag", [flag for flag in NUMBERS if flag.options["type"] is float], ids=lambda f: f.name
)
@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e400"])
def test_what_is_no_number_is_refused(flag, word: str, check) -> None:
    assert any(problem.startswith(f"{flag.name} ") for problem in problems_of(check, f"{flag.name} {word}"))


@pytest.mark.parametrize("flag", COUNTED, ids=lambda f: f.name)
def test_a_number_beyond_counting_is_refused_by_its_name_alone(flag, check) -> None:
    (problem,) = problems_of(check, f"{flag.name} 1000000000000 --rampup-batch-size 1 1 1000000000000")
    assert problem.startswith(f"{flag.name} 1000000000000: must be at most ")


@pytest.mark.parametrize(
    "flag",
    [flag for flag in NUMBERS if flag.options["type"] is int and "choices" not in flag.options],
    ids=lambda f: f.name,
)
def test_numbers_fit_64_bits(flag, check) -> None:
    problems = problems_of(check, f"{flag.name} {2**63}")
    assert [problem.startswith(f"{flag.name} {2**63}: ") for problem in problems].count(True) == 1


def test_accepted_numbers_may_be_anything(check) -> None:
    accepted = [flag for flag in ALL_FLAGS if flag.notice]
    numbers = [f for f in accepted if f.options.get("type") is int and "choices" not in f.options]
    words = [
        f"{f.name} 1000000000000" for f in numbers if f.name != "--inference-batch-times-seqlen-threshold"
    ]
    check(" ".join(words))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--seed 4294967296", "--seed 4294967296: must be at most 4294967295"),
        ("--disable-override x", "--disable-override x: no replaceable function has that name"),
        (
            "--disable-override gelu,rms_nrm",
            "did you mean 'megatron.core.fusions.fused_layer_norm.rms_norm'?",
        ),
        ("--disable-override ,", "--disable-override: names no kernel"),
        ("--fp16 --initial-loss-scale 0.5", "--initial-loss-scale 0.5: is below --min-loss-scale 1"),
        ("--fp16 --loss-scale 1e30", "--loss-scale 1e+30: must be above 0 and at most"),
        ("--init-method-std 1e30", "--init-method-std 1e+30: must be at least 0 and at most 1000"),
        ("--no-initialization", "--no-initialization: leaves the weights as the memory happens to be"),
    ],
)
def test_values_that_no_run_can_use(words: str, problem: str, check) -> None:
    (found,) = problems_of(check, words)
    assert problem in found


def test_the_largest_seed_leaves_room_for_the_stages(check, monkeypatch) -> None:
    check("--seed 4294967295")
    for name, word in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, word)
    pipeline = "--pipeline-model-parallel-size 2"
    check(f"--seed {2**32 - 101} {pipeline}")
    (problem,) = problems_of(check, f"--seed {2**32 - 100} {pipeline}")
    assert problem.startswith(f"--seed {2**32 - 100}: must be at most {2**32 - 101}")


@pytest.fixture
def completed(check, monkeypatch):
    """Validated arguments of a machine with 16 GiB."""
    monkeypatch.setattr(memory_limits, "_host_memory", lambda: 16 * 2**30)

    def make(words: str) -> Namespace:
        args = check(words)
        args.padded_vocab_size = getattr(args, "vocab_size", None) or 128
        return args

    return make


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--hidden-size 1000000", "--hidden-size"),
        ("--ffn-hidden-size 1000000000", "--ffn-hidden-size"),
        ("--num-layers 1000000", "--num-layers"),
        ("--kv-channels 1000000000", "--kv-channels"),
        ("--vocab-size 1000000000", "--vocab-size"),
        ("--max-position-embeddings 1000000000", "--max-position-embeddings"),
        ("--train-iters 1000000000000", "--train-iters"),
        ("--eval-iters 1000000000000", "--eval-iters"),
        ("--micro-batch-size 10000000 --global-batch-size 10000000", "--micro-batch-size"),
        ("--reset-attention-mask --seq-length 1000000 --max-position-embeddings 1000000", "--seq-length"),
    ],
)
def test_a_run_that_cannot_fit_is_refused_by_its_heaviest_flag(words: str, flag: str, completed) -> None:
    assert accelerator.device_type() == "cpu"
    args = completed(words)
    with pytest.raises(ConfigError, match=rf"^{flag} \d+: this run needs at least .* GiB"):
        memory_limits.check_memory(args)


def test_a_run_that_fits_is_let_through(completed) -> None:
    """1.3e9 parameters of 2 + 4 + 12 bytes each exceed 16 GiB; without optimizer state they do not."""
    words = "--num-layers 24 --hidden-size 2048 --ffn-hidden-size 8192 --bf16 --vocab-size 50304"
    words += " --seq-length 1024 --max-position-embeddings 1024"
    with pytest.raises(ConfigError):
        memory_limits.check_memory(completed(words))
    memory_limits.check_memory(completed(f"{words} --skip-train"))
    memory_limits.check_memory(completed(f"{words} --optimizer sgd"))
    memory_limits.check_memory(completed(""))


@pytest.mark.parametrize(("buckets", "elements"), [(1, 1000), (3, 334), (7, 143), (5000, 1)])
def test_the_number_of_buckets_divides_the_parameters(buckets: int, elements: int, check) -> None:
    args = check(f"--ddp-num-buckets {buckets}")
    assert ddp_config_from_args(args, 1000).bucket_size == elements


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["no.such.module", "spec"], "No module named"),
        (["megatron.core.models.gpt.gpt_layer_specs", "no_such"], "has no 'no_such'"),
        (["", "spec"], "module name"),
        (["math", "pi"], "is of type float, not a spec"),
        (["megatron.core.utils", "divide"], "divide"),
    ],
)
def test_a_spec_that_is_none_is_refused_by_its_flag(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=r"^--spec ") as error:
        spec_by_name(words)
    assert part in str(error.value)


def test_a_function_that_makes_a_spec_is_called() -> None:
    """The example in the message about --spec works."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    words = ["megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"]
    assert spec_by_name(words) == get_gpt_layer_local_spec()
