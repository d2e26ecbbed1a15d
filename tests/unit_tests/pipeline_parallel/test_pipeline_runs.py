"""Stages on several ranks compute what the whole chain computes in one process, in every schedule."""

import pytest
import torch
from toy_stages import Stage, expected, run_pipeline

from tests.distributed.pool import run_ranks


def check(results, reports, grads):
    """The last rank reports; every gradient of the chain is on the rank that holds its stage."""
    assert [rank_reports for rank_reports, *_ in results[:-1]] == [[]] * (len(results) - 1)
    for found, wanted in zip(results[-1][0], reports, strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-12)
    found = {stage: grad for _, rank_grads, *_ in results for stage, grad in rank_grads.items()}
    assert sorted(found) == list(range(len(grads)))
    for stage, wanted in enumerate(grads):
        for name, value in wanted.items():
            torch.testing.assert_close(
                found[stage][name], value, rtol=1e-11, atol=1e-13, msg=f"{stage} {name}"
            )


SCHEDULES = [
    ("1f1b", 2, 1, 5),
    ("1f1b", 4, 1, 6),
    ("1f1b", 4, 1, 2),
    ("zb-h1", 2, 1, 5),
    ("zb-h1", 4, 1, 6),
    ("zb-h1", 4, 1, 3),
    ("interleaved", 2, 2, 4),
    ("interleaved", 2, 3, 5),
    ("interleaved", 4, 2, 8),
    ("interleaved", 3, 2, 6),
    ("interleaved", 2, 1, 4),
]


@pytest.mark.parametrize(("schedule", "world", "chunks", "microbatches"), SCHEDULES)
def test_losses_and_gradients_equal_one_process(schedule, world, chunks, microbatches):
    results = run_ranks(world, run_pipeline, schedule, chunks, microbatches)
    check(results, *expected(world * chunks, microbatches))


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zb-h1", 1)])
@pytest.mark.parametrize(
    "changes",
    [
        {"batch_p2p_comm": False},
        {"batch_p2p_comm": False, "overlap_p2p_comm": True},
        {"batch_p2p_comm": False, "overlap_p2p_comm": True, "overlap_p2p_comm_warmup_flush": True},
        {"deallocate": False},
        {"variable": True},
        {"variable": True, "batch_p2p_comm": False},
        {"steps": 2},
    ],
    ids="+".join,
)
def test_no_way_of_sending_changes_the_numbers(schedule, chunks, changes):
    results = run_ranks(2, run_pipeline, schedule, chunks, 4, **changes)
    check(results, *expected(2 * chunks, 4, variable=changes.get("variable", False)))


def test_a_larger_group_of_microbatches_changes_only_the_order():
    results = run_ranks(2, run_pipeline, "interleaved", 2, 7, microbatch_group_size_per_vp_stage=3)
    check(results, *expected(4, 7))


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("interleaved", 2)])
def test_three_values_divide_by_tokens(schedule, chunks):
    results = run_ranks(2, run_pipeline, schedule, chunks, 4, loss="triple")
    check(results, *expected(2 * chunks, 4, loss="triple"))
    assert [tokens for *_, tokens in results] == [[None]] * 2


def test_per_token_loss_hands_the_number_of_tokens_to_finalization():
    results = run_ranks(2, run_pipeline, "1f1b", 1, 4, loss="triple", calculate_per_token_loss=True)
    reports, grads = expected(2, 4, loss="triple", per_token=True)
    check(results, reports, grads)
    assert [int(tokens[0]) for *_, tokens in results] == [0, sum(report["loss"][1] for report in reports)]


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("zb-h1", 1), ("interleaved", 2)])
def test_forward_only_reports_the_same_losses_and_leaves_no_gradient(schedule, chunks):
    results = run_ranks(4, run_pipeline, schedule, chunks, 5 if chunks == 1 else 8, forward_only=True)
    reports, _ = expected(4 * chunks, 5 if chunks == 1 else 8)
    assert [report["loss"] for report in results[-1][0]] == pytest.approx([r["loss"] for r in reports])
    assert all(grad is None for _, grads, _ in results for g in grads.values() for grad in g.values())
    assert [tokens for *_, tokens in results] == [[]] * 4


def test_data_that_is_no_loss_is_collected_on_the_last_stage():
    results = run_ranks(2, run_pipeline, "1f1b", 1, 3, forward_only=True, collect_non_loss_data=True)
    assert results[0][0] == []
    assert len(results[1][0]) == 3 and all(isinstance(value, float) for value in results[1][0])


def visited_stages(chunks, microbatches, group):
    """Virtual stages in the order in which this rank runs their forward passes."""
    order, forward = [], Stage.forward

    def recorded(stage, x):
        order.append(stage.number)
        return forward(stage, x)

    Stage.forward = recorded
    try:
        sizes = {"microbatch_group_size_per_vp_stage": group}
        run_pipeline("interleaved", chunks, microbatches, forward_only=True, **sizes)
    finally:
        Stage.forward = forward
    return order


@pytest.mark.parametrize("group", [2, 4, 8])
def test_as_many_microbatches_as_a_group_holds_pass_a_chunk_back_to_back(group):
    for rank, order in enumerate(run_ranks(2, visited_stages, 2, 8, group)):
        assert order == [
            chunk * 2 + rank for _ in range(8 // group) for chunk in range(2) for _ in range(group)
        ]
