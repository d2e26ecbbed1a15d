"""How a world and a model divide: what is derived, what is refused and which sizes are offered instead."""

import pytest
from conftest import TRAINING

from megatron.core.transformer.pipeline_layout import get_layer_counts
from megatron.training.arguments import ArgumentsError, core_transformer_config_from_args

EIGHT_LAYERS = TRAINING.replace("--num-layers 2", "--num-layers 8")


@pytest.fixture
def world(monkeypatch):
    """``world(8)``: a launcher started so many processes."""
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "6000")
    return lambda size: monkeypatch.setenv("WORLD_SIZE", str(size))


def problems_of(check, words: str) -> list[str]:
    with pytest.raises(ArgumentsError) as error:
        check(words, base=EIGHT_LAYERS)
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize(
    ("size", "words", "parts"),
    [
        (6, "--tensor-model-parallel-size 4", ["4 x 1 x 1 = 4 ranks", "start 4 or 8 ranks", "-size 3"]),
        (6, "--pipeline-model-parallel-size 4", ["1 x 4 x 1 = 4 ranks", "-parallel-size 3"]),
        (
            1,
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
            ["= 4 ranks; start 4 ranks;", "MEGATRON_CLAMP_PARALLEL=1"],
        ),
        (
            12,
            "--tensor-model-parallel-size 4 --context-parallel-size 2",
            ["= 8 ranks; start 8 or 16 ranks, or use --tensor-model-parallel-size 3"],
        ),
        (
            6,
            "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 4",
            ["expert tensor x expert x pipeline = 4 x 1 x 1", "--expert-tensor-parallel-size 3"],
        ),
    ],
)
def test_a_world_that_does_not_divide_is_told_what_would(size, words, parts, check, world):
    world(size)
    text = problems_of(check, words)[0]
    assert text.startswith(f"WORLD_SIZE {size}: ")
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("size", "tp", "pp", "clamped"),
    [(1, 8, 8, (1, 1)), (8, 8, 8, (8, 1)), (8, 4, 8, (4, 2)), (8, 2, 2, (2, 2)), (2, 1, 4, (1, 2))],
)
def test_sizes_shrink_to_the_world_on_request(size, tp, pp, clamped, check, world, monkeypatch, capsys):
    """TP = min(TP, world), PP = min(PP, world // TP): what trainers did in 2023."""
    world(size)
    monkeypatch.setenv("MEGATRON_CLAMP_PARALLEL", "1")
    base = EIGHT_LAYERS.replace("--num-attention-heads 4", "--num-attention-heads 8")
    args = check(f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}", base=base)
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == clamped
    printed = capsys.readouterr().out
    for flag, asked, got in (("tensor", tp, clamped[0]), ("pipeline", pp, clamped[1])):
        line = f"WARNING: MEGATRON_CLAMP_PARALLEL=1: --{flag}-model-parallel-size {asked} is reduced to {got}"
        assert (line in printed) == (asked != got)


def test_a_clamped_world_must_still_divide(check, world, monkeypatch):
    world(6)
    monkeypatch.setenv("MEGATRON_CLAMP_PARALLEL", "1")
    assert problems_of(check, "--tensor-model-parallel-size 4")[0].startswith("WORLD_SIZE 6: ")


@pytest.mark.parametrize(
    ("words", "stages", "counts"),
    [
        ("--num-layers-per-virtual-pipeline-stage 1", 4, [1] * 8),
        ("--num-layers-per-virtual-pipeline-stage 2", 2, [2] * 4),
        ("--num-virtual-stages-per-pipeline-rank 4", 4, [1] * 8),
        ("", None, [4, 4]),
        ("--decoder-first-pipeline-num-layers 3", None, [3, 5]),
        ("--num-virtual-stages-per-pipeline-rank 2 --decoder-last-pipeline-num-layers 6", 2, [1, 3, 1, 3]),
        (
            "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split "
            "--num-virtual-stages-per-pipeline-rank 5",
            5,
            [0] + [1] * 8 + [0],
        ),
    ],
)
def test_virtual_stages(words, stages, counts, check, world):
    world(2)
    args = check(f"--pipeline-model-parallel-size 2 --global-batch-size 4 {words}", base=EIGHT_LAYERS)
    assert args.virtual_pipeline_model_parallel_size == stages
    assert args.overlap_p2p_comm == args.align_param_gather == (stages is not None)
    config = core_transformer_config_from_args(args)
    assert config.batch_p2p_comm == (stages is None)
    assert get_layer_counts(config) == counts


PIPE = "--pipeline-model-parallel-size 2"
VIRTUAL = f"{PIPE} --num-virtual-stages-per-pipeline-rank 2"


@pytest.mark.parametrize(
    ("words", "flag", "part"),
    [
        (f"{VIRTUAL} --num-layers-per-virtual-pipeline-stage 2", "--num-layers-per-virtual", "keep one"),
        ("--num-virtual-stages-per-pipeline-rank 2", "--num-virtual-stages", "several pipeline stages"),
        (f"{PIPE} --num-virtual-stages-per-pipeline-rank 3", "--num-layers 8", "use --num-layers 12"),
        (f"{PIPE} --num-layers-per-virtual-pipeline-stage 3", "--num-layers-per-virtual", "stage 2"),
        (
            f"{PIPE} --num-layers-per-virtual-pipeline-stage 2 --decoder-first-pipeline-num-layers 2",
            "--decoder-first-pipeline-num-layers 2",
            "--num-virtual-stages-per-pipeline-rank instead",
        ),
        ("--decoder-last-pipeline-num-layers 2", "--decoder-last", "several pipeline stages"),
        (f"{PIPE} --decoder-first-pipeline-num-layers 8", "model", "leave 0"),
        (f"{PIPE} --decoder-first-pipeline-num-layers 16", "model", ": --decoder-first-pipeline-num-layers)"),
        (
            f"{PIPE} --account-for-loss-in-pipeline-split",
            "--num-layers 8",
            "9 with the embedding and the loss",
        ),
        (f"{PIPE} --pipeline-schedule interleaved", "--pipeline-schedule", "needs virtual stages"),
        (f"{VIRTUAL} --pipeline-schedule zb-h1", "--pipeline-schedule zb-h1", "one virtual stage"),
        ("--pipeline-schedule 1f1b", "--pipeline-schedule 1f1b", "several pipeline stages"),
        (f"{VIRTUAL} --global-batch-size 6", "--global-batch-size 6", "use --global-batch-size 8"),
        (f"{VIRTUAL} --global-batch-size 24", "--global-batch-size 24", "the last 1 cannot be interleaved"),
        (
            f"{VIRTUAL} --train-samples 64 --rampup-batch-size 8 8 32 --global-batch-size 16",
            "--rampup-batch-size",
            "1 micro-batches per data-parallel rank at size 8; the last 1 cannot be interleaved",
        ),
        (
            f"{VIRTUAL} --microbatch-group-size-per-virtual-pipeline-stage 1",
            "--microbatch-group-size",
            "below the 2 pipeline stages",
        ),
        (
            f"{PIPE} --microbatch-group-size-per-virtual-pipeline-stage 2",
            "--microbatch-group-size",
            "needs virtual pipeline stages",
        ),
        ("--tensor-model-parallel-size 8", "--num-attention-heads 4", "is not a multiple of"),
        (
            "--tensor-model-parallel-size 4 --group-query-attention --num-query-groups 2",
            "--num-query-groups 2",
            "use 4",
        ),
        ("--tensor-model-parallel-size 4 --ffn-hidden-size 90", "--ffn-hidden-size 90", "use 92"),
        ("--context-parallel-size 2 --seq-length 30", "--seq-length 30", "use --seq-length 32"),
        (
            "--context-parallel-size 2 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 28",
            "--seq-length 28",
            "multiple of 8",
        ),
        ("--context-parallel-size 4 --cp-comm-type a2a+p2p", "--cp-comm-type", "sizes 2 2"),
        (
            "--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 4",
            "--hierarchical-context-parallel-sizes 2 4",
            "multiply to 8",
        ),
        ("--context-parallel-size 4 --ulysses-degree-in-cp 3", "--ulysses-degree-in-cp 3", "divide"),
        ("--cp-comm-type ring", "--cp-comm-type ring", "p2p, all_gather, a2a, a2a+p2p"),
        ("--overlap-param-gather", "--overlap-param-gather", "add --use-distributed-optimizer"),
        (
            "--use-distributed-optimizer --disable-gloo-process-groups --save x --save-interval 1",
            "--disable-gloo-process-groups",
            "collected over gloo",
        ),
        ("--distribute-saved-activations", "--distribute-saved-activations", "parallel-size 2"),
    ],
)
def test_sizes_that_do_not_go_together(words, flag, part, check, world):
    world(8)
    problems = problems_of(check, words)
    assert any(problem.startswith(flag) and part in problem for problem in problems), problems


def test_all_size_problems_are_reported_at_once(check, world):
    world(6)
    problems = problems_of(
        check, "--tensor-model-parallel-size 4 --context-parallel-size 2 --seq-length 30 --ffn-hidden-size 90"
    )
    assert [text.split(":")[0].split()[0] for text in problems] == [
        "WORLD_SIZE",
        "--ffn-hidden-size",
        "--seq-length",
    ]


def test_ranks_need_a_place_to_meet(check, world, monkeypatch):
    world(2)
    monkeypatch.delenv("MASTER_PORT")
    (problem,) = problems_of(check, "")
    assert problem.startswith("WORLD_SIZE 2: MASTER_ADDR and MASTER_PORT do not say")


def test_older_names_of_the_context_exchange(check, world):
    world(4)
    args = check("--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2")
    assert args.cp_comm_type == ["a2a+p2p"] and args.hierarchical_context_parallel_sizes == [2, 2]
    args = check("--context-parallel-size 4 --context-parallel-algo ulysses_cp_algo")
    assert args.cp_comm_type == ["a2a"]
    args = check("--context-parallel-size 4")
    assert args.cp_comm_type == ["p2p"]
