"""No buffer is read before its message is there, and none is reused before its message has left."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.gpt_run import NO_DROPOUT, Result, run, worst_difference
from tests.distributed.late_delivery import delivered_late
from tests.distributed.layouts import Layout
from tests.distributed.pool import run_ranks
from tests.distributed.real_loop import Record, train

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-5
BOTH = "sharded-overlap-both"
# What runs behind computation: every kind of message once, and kinds that share their ranks.
LAYOUTS = [
    Layout(tp=2, dp=2, sequence_parallel=True, reduction=BOTH),
    Layout(cp=2, dp=2, model="llama", reduction="overlap-reduce"),
    Layout(pp=2, vpp=2, dp=2, reduction=BOTH),
]
MORE = [
    Layout(tp=2, pp=2, reduction="plain"),
    Layout(tp=2, cp=2, sequence_parallel=True, reduction=BOTH),
    Layout(cp=4, model="llama", reduction=BOTH),
    Layout(cp=4, model="llama", context="a2a+p2p", reduction=BOTH),
    Layout(pp=4, pipeline="zb-h1"),
    Layout(pp=4),
    Layout(pp=2, vpp=2, pipeline="no-overlap"),
    Layout(pp=2, dp=2, pipeline="zb-h1", reduction=BOTH),
    Layout(tp=2, pp=2, sequence_parallel=True, pipeline="zb-h1"),
    Layout(pp=4, vpp=1, dp=2, reduction=BOTH),
]


@pytest.fixture(scope="module")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@cache
def reference(model: str, data_cache: Path) -> Result:
    return run(Layout(model=model), data_cache)


def read_before_waiting() -> tuple[bool, list[float]]:
    with delivered_late():
        numbers = torch.ones(3)
        work = dist.all_reduce(numbers, async_op=True)
        early = bool(numbers.isnan().all())
        work.wait()
        return early, numbers.tolist()


def write_what_is_being_sent() -> None:
    with delivered_late():
        numbers, gathered = torch.ones(3), torch.empty(6)
        work = dist.all_gather_into_tensor(gathered, numbers, async_op=True)
        numbers.zero_()
        work.wait()


def write_where_a_result_is_to_come() -> None:
    with delivered_late():
        numbers = torch.ones(4)
        mine = numbers[dist.get_rank() * 2 :][:2]
        work = dist.reduce_scatter_tensor(mine, numbers, async_op=True)
        mine.zero_()
        work.wait()


def forget_to_wait() -> None:
    with delivered_late():
        dist.all_reduce(torch.ones(3), async_op=True)


def swap(in_a_batch: bool) -> tuple[bool, float]:
    with delivered_late():
        peer, sent, received = 1 - dist.get_rank(), torch.full((1,), float(dist.get_rank())), torch.zeros(1)
        calls = [(dist.isend, sent), (dist.irecv, received)]
        if dist.get_rank() == 1:
            calls.reverse()
        works = (
            dist.batch_isend_irecv([dist.P2POp(op, tensor, peer) for op, tensor in calls])
            if in_a_batch
            else [op(tensor, peer) for op, tensor in calls]
        )
        early = bool(received.isnan())
        for work in works:
            work.wait()
        return early, float(received)


def test_results_come_when_they_are_waited_for() -> None:
    assert run_ranks(2, read_before_waiting) == [(True, [2.0] * 3)] * 2


@pytest.mark.parametrize("in_a_batch", [False, True])
def test_messages_come_when_they_are_waited_for(in_a_batch: bool) -> None:
    assert run_ranks(2, swap, in_a_batch) == [(True, 1.0), (True, 0.0)]


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        (write_what_is_being_sent, "was written to under way"),
        (write_where_a_result_is_to_come, "was written to under way"),
        (forget_to_wait, "nobody waited for it"),
    ],
)
def test_wrong_use_is_found(job: Callable[[], None], problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        run_ranks(2, job)


def train_late(argv: list[str]) -> Record:
    with delivered_late() as counts:
        record = train(argv)
    assert counts, "nothing was asynchronous"
    return record


def check(layout: Layout, data_cache: Path, extra: str = "") -> None:
    result = run(layout, data_cache, f"{NO_DROPOUT} {extra}", job=train_late)
    worst = worst_difference(result, reference(layout.model, data_cache))
    assert worst.pop("loss") < LOSS_TOLERANCE
    assert max(worst.values()) < GRADIENT_TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_waits_for_what_it_reads(layout: Layout, data_cache: Path) -> None:
    check(layout, data_cache)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MORE, ids=str)
def test_training_in_more_layouts_waits_for_what_it_reads(layout: Layout, data_cache: Path) -> None:
    check(layout, data_cache)


def test_evaluating_and_saving_wait_for_the_parameters(data_cache: Path, tmp_path: Path) -> None:
    between_steps = f"--eval-interval 2 --eval-iters 1 --save {tmp_path} --save-interval 2 --log-params-norm"
    check(Layout(dp=2, reduction=BOTH), data_cache, between_steps)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, sequence_parallel=True), Layout(tp=2, model="llama")], ids=str
)
def test_chunked_matmuls_wait_for_what_they_read(layout: Layout, data_cache: Path) -> None:
    check(layout, data_cache, "--use-ascend-coc --coc-parallel-num 2")
