"""Flags of experts: what follows from them, and which of them do not go together."""

from argparse import Namespace

import pytest

from megatron.training.arguments import ArgumentsError, core_transformer_config_from_args
from megatron.training.arguments.rules.moe import parts_of_experts_have_files

EXPERTS = "--num-experts 8 --moe-ffn-hidden-size 32 --disable-bias-linear"


@pytest.fixture
def ranks(monkeypatch):
    for name, value in (("WORLD_SIZE", "4"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("", "moe_layer_freq", 1),
        ("--moe-layer-freq 2", "moe_layer_freq", 2),
        ("--moe-layer-freq -1", "moe_layer_freq", 1),
        ("--moe-layer-freq [0]+[1]", "moe_layer_freq", [0, 1]),
        ("--first-k-dense-replace 1 --moe-layer-freq 1", "moe_layer_freq", [0, 1]),
        ("--first-k-dense-replace 1 --moe-layer-freq -1", "moe_layer_freq", [0, 1]),
        # What counts is the number of the layer, from 0, not its distance from the first one with experts.
        ("--first-k-dense-replace 1 --moe-layer-freq 2 --num-layers 5", "moe_layer_freq", [0, 0, 1, 0, 1]),
        ("--first-k-dense-replace 0 --moe-layer-freq 2", "moe_layer_freq", 1),
        ("--first-k-dense-replace -1 --moe-layer-freq -1", "moe_layer_freq", 1),
        ("--n-shared-experts 2", "moe_shared_expert_intermediate_size", 64),
        ("--n-shared-experts 0", "moe_shared_expert_intermediate_size", None),
        ("--n-shared-experts 1 --shared-expert-gate", "moe_shared_expert_gate", True),
        ("--moe-intermediate-size 48", "moe_ffn_hidden_size", 48),
        ("--moe-grouped-gemm --moe-use-legacy-grouped-gemm", "moe_use_legacy_grouped_gemm", True),
        ("--moe-layer-recompute", "recompute_modules", ["core_attn", "moe"]),
    ],
)
def test_a_flag_becomes_a_field(words, field, value, check):
    config = core_transformer_config_from_args(check(f"{EXPERTS} {words}"))
    assert getattr(config, field) == value


def test_experts_extended_over_tensor_ranks_are_whole_and_more_spread(check, ranks):
    args = check(
        f"{EXPERTS} --moe-tp-extend-ep --tensor-model-parallel-size 2 --expert-model-parallel-size 2 "
        "--sequence-parallel"
    )
    assert (args.expert_model_parallel_size, args.expert_tensor_parallel_size) == (4, 1)


def test_every_wrong_size_is_told_at_once(check, ranks):
    with pytest.raises(ArgumentsError) as caught:
        check(
            "--num-experts 6 --expert-model-parallel-size 4 --expert-tensor-parallel-size 1 "
            "--tensor-model-parallel-size 2 --moe-layer-freq [1,1,1] --n-shared-experts 2 "
            "--moe-shared-expert-intermediate-size 5"
        )
    problems = [str(problem) for problem in caught.value.problems]
    beginnings = [
        "--num-experts 6: does not divide among --expert-model-parallel-size 4; use --num-experts 8",
        "--moe-shared-expert-intermediate-size 5: does not divide among --tensor-model-parallel-size 2",
        "--num-experts 6: experts have no biases; add --disable-bias-linear",
        "--num-experts 6: experts with --tensor-model-parallel-size 2 need --sequence-parallel",
        "--moe-layer-freq 1 1 1: says 0 or 1 for 3 layers; give 0 (dense) or 1 (experts) for each of the 2",
        "--n-shared-experts 2: makes 512 channels, but --moe-shared-expert-intermediate-size is 5",
    ]
    for beginning in beginnings:
        assert any(problem.startswith(beginning) for problem in problems), (beginning, problems)
    assert len(problems) == len(beginnings), problems


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--moe-layer-freq 0", "--moe-layer-freq 0: is no number of layers"),
        ("--first-k-dense-replace 2", "--first-k-dense-replace 2: leaves none of the 2 layers for experts"),
        (
            "--first-k-dense-replace 1 --moe-layer-freq [1,0]",
            "--first-k-dense-replace 1: is said by the list of --moe-layer-freq already",
        ),
        ("--moe-ffn-hidden-size 33 --expert-tensor-parallel-size 2", "--moe-ffn-hidden-size 33: does not"),
        ("--moe-tp-extend-ep --expert-tensor-parallel-size 1", "--moe-tp-extend-ep: excludes"),
        ("--shared-expert-gate", "--shared-expert-gate: needs shared experts"),
        ("--moe-shared-expert-overlap --n-shared-experts 1", "model: moe_shared_expert_overlap"),
        ("--moe-pad-expert-input-to-capacity", "model: moe_pad_expert_input_to_capacity"),
        ("--recompute-granularity selective --recompute-modules moe_act", "model: recompute_modules moe_act"),
        ("--num-experts 0 --expert-model-parallel-size 2", "model: expert_model_parallel_size 2"),
    ],
)
def test_what_does_not_fit_is_refused(words, problem, check, ranks):
    with pytest.raises(ArgumentsError) as caught:
        check(f"{EXPERTS} {words}")
    problems = [str(each) for each in caught.value.problems]
    assert any(each.startswith(problem) for each in problems), problems


@pytest.mark.parametrize("parts, problems", [(1, 0), (2, 0), (4, 0), (8, 0), (3, 1)])
def test_a_checkpoint_needs_parts_of_experts_that_its_names_tell_apart(parts, problems):
    args = Namespace(
        num_experts=8, save="here", tensor_model_parallel_size=4, expert_tensor_parallel_size=parts
    )
    assert len(parts_of_experts_have_files(args, ())) == problems
    args.save = None
    assert not parts_of_experts_have_files(args, ())


def test_without_experts_their_flags_say_that_nothing_happens(check, capsys):
    check("--moe-grouped-gemm --n-shared-experts 1 --moe-token-dispatcher-type alltoall")
    lines = capsys.readouterr().out.splitlines()
    for flag in ("--moe-grouped-gemm", "--n-shared-experts", "--moe-token-dispatcher-type"):
        assert f"WARNING: {flag} has no effect without --num-experts" in lines
