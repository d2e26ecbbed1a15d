"""Accepted flags say one line, refused flags and flags without a feature stop the run."""

from dataclasses import fields

import pytest

from megatron.training.arguments import ArgumentsError, core_transformer_config_from_args
from megatron.training.arguments.flag import Flag, Refused
from megatron.training.arguments.flags import ALL_FLAGS, INERT_DESTS
from megatron.training.model_setup import ddp_config_from_args, optimizer_config_from_args

ACCEPTED = [flag for flag in ALL_FLAGS if flag.notice]
REFUSED = [flag for flag in ALL_FLAGS if flag.refusal]
NOT_BUILT = [flag for flag in ALL_FLAGS if flag.not_built]
REFUSED_VALUES = [
    (flag.name, value)
    for flag in ALL_FLAGS
    for status in flag.status
    if isinstance(status, Refused)
    for value in status.values
]

# What an accepted flag has to come with.
COMPANIONS = {
    "--tp-comm-overlap": "--sequence-parallel",
    "--use-fused-rmsnorm": "--normalization RMSNorm",
    "--use-fused-swiglu": "--swiglu",
    "--use-fused-rotary-pos-emb": "--position-embedding-type rope",
    "--reuse-fp32-param": "--bf16",
    "--inference-batch-times-seqlen-threshold": "",
}
SAMPLES = {
    "--inference-batch-times-seqlen-threshold": "-1",
    "--recompute-modules": "core_attn mla_up_proj",
    "--position-embedding-type": "relative",
    "--non-persistent-ckpt-type": "global",
    "--ckpt-format": "torch_dist",
    "--rerun-mode": "validate_results",
    "--moe-layer-freq": "([0]+[1]*1)",
}


def sample(flag: Flag) -> str:
    """The flag with a value that is not its default."""
    options = flag.options
    if "action" in options:
        return flag.name
    if flag.name in SAMPLES:
        return f"{flag.name} {SAMPLES[flag.name]}"
    others = [choice for choice in options.get("choices", ()) if choice not in (None, flag.default)]
    value = others[0] if others else {int: 7, float: 0.75}.get(options.get("type"), "word")
    return f"{flag.name} {value}"


def problems_of(check, words: str) -> list[str]:
    with pytest.raises(ArgumentsError) as error:
        check(words)
    assert error.value.exit_status == 1
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize("flag", ACCEPTED, ids=lambda flag: flag.name)
def test_accepted_flag_prints_one_line(flag: Flag, check, capsys, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: None)
    words = f"{sample(flag)} {COMPANIONS.get(flag.name, '')}"
    check(words)
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith(f"notice: {flag.name}:")
    ]
    assert len(lines) == 1 and len(lines[0]) > len(flag.name) + 20


def test_other_ranks_are_silent(check, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ArgumentsError):
        check("--openai-gelu")
    assert capsys.readouterr().out == ""


def test_a_flag_that_is_not_given_prints_nothing(check, capsys) -> None:
    check()
    assert "notice:" not in capsys.readouterr().out


@pytest.mark.parametrize("flag", REFUSED, ids=lambda flag: flag.name)
def test_refused_flag_stops_the_run(flag: Flag, check) -> None:
    (problem,) = problems_of(check, sample(flag))
    assert problem.startswith(flag.name) and ";" in problem


@pytest.mark.parametrize(
    ("withdrawn", "successor"),
    [
        ("--batch-size 4", "--micro-batch-size"),
        ("--warmup 4", "--lr-warmup-fraction"),
        ("--model-parallel-size 2", "--tensor-model-parallel-size"),
        ("--checkpoint-activations", "--recompute-granularity full"),
    ],
)
def test_withdrawn_flag_names_its_successor(withdrawn: str, successor: str, check) -> None:
    (problem,) = problems_of(check, withdrawn)
    assert successor in problem


@pytest.mark.parametrize(("flag", "value"), REFUSED_VALUES)
def test_refused_value_stops_the_run(flag: str, value: str, check) -> None:
    assert any(problem.startswith(f"{flag} {value}:") for problem in problems_of(check, f"{flag} {value}"))


@pytest.mark.parametrize("flag", NOT_BUILT, ids=lambda flag: flag.name)
def test_missing_feature_stops_the_run(flag: Flag, check) -> None:
    problems = problems_of(check, sample(flag))
    named = [problem for problem in problems if problem.startswith(flag.name)]
    assert len(named) == 1 and f"{flag.not_built.feature} is not built yet" in named[0]


@pytest.mark.parametrize(
    "words",
    [
        "--no-overlap-p2p-communication --use-tp-pp-dp-mapping --no-async-tensor-model-parallel-allreduce",
        "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --context-parallel-size 1",
        "--expert-model-parallel-size 1 --expert-tensor-parallel-size 1 --num-experts 0",
        "--context-parallel-algo ulysses_cp_algo --cp-comm-type a2a --attention-mask-type causal",
        "--no-align-grad-reduce --no-align-param-gather --ddp-average-in-collective --ddp-bucket-size 1000",
        "--account-for-embedding-in-pipeline-split --disable-gloo-process-groups --no-shared-storage",
        "--no-ckpt-fully-parallel-save --ckpt-fully-parallel-load --auto-detect-ckpt-format",
        "--moe-layer-freq 1 --moe-router-topk 2 --moe-token-dispatcher-type allgather --rerun-mode disabled",
    ],
)
def test_harmless_in_one_process(words: str, check) -> None:
    check(words)


def test_inert_flags_never_reach_a_config(check) -> None:
    words = [sample(flag) for flag in ACCEPTED if flag.dest in INERT_DESTS]
    companions = "--normalization RMSNorm --swiglu --position-embedding-type rope --bf16"
    args = check(f"{' '.join(words)} {companions} --sequence-parallel --no-rope-fusion")
    seen = set()
    for make in (core_transformer_config_from_args, ddp_config_from_args, optimizer_config_from_args):
        config = make(args)
        defaults = {entry.name: entry.default for entry in fields(config)}
        named = INERT_DESTS & defaults.keys()
        assert {name: getattr(config, name) for name in named} == {name: defaults[name] for name in named}
        seen |= named
    assert {"fp8", "enable_cuda_graph", "tp_comm_overlap", "fp8_param_gather"} <= seen
