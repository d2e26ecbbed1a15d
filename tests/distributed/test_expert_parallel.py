"""Experts spread over ranks train as on one rank: losses and every gradient through the real loop."""

import functools

import pytest

from tests.distributed.gpt_run import run, worst_difference
from tests.distributed.layouts import Layout

GROUPED = "--moe-grouped-gemm"


def mixed(dispatcher, more="", **sizes):
    """A layout of the model with experts."""
    return Layout(model="moe", experts=f"--moe-token-dispatcher-type {dispatcher} {more}", **sizes)


LAYOUTS = {
    "ep2": mixed("alltoall", GROUPED, dp=2, ep=2),
    "ep2, sharded optimizer": mixed("alltoall_seq", dp=2, ep=2, reduction="sharded"),
    "tp2 ep2 etp1": mixed(
        "alltoall", f"{GROUPED} --moe-shared-expert-overlap", tp=2, ep=2, etp=1, sequence_parallel=True
    ),
    "tp2 ep2 etp2": mixed(
        "alltoall_seq",
        f"{GROUPED} --moe-layer-recompute",
        tp=2,
        dp=2,
        ep=2,
        sequence_parallel=True,
        reduction="sharded-overlap-both",
    ),
    "cp2 ep2": mixed("allgather", cp=2, ep=2),
    "pp2 ep2": mixed("flex", pp=2, dp=2, ep=2, reduction="sharded-overlap-reduce"),
    "tp2 pp2 vpp2 ep2 etp1": mixed(
        "alltoall",
        f"{GROUPED} --recompute-granularity selective --recompute-modules moe_act",
        tp=2,
        pp=2,
        vpp=2,
        ep=2,
        etp=1,
        sequence_parallel=True,
    ),
    "etp2 over data-parallel ranks": mixed("alltoall", GROUPED, dp=2, etp=2),
    "tp2 etp1 without ep": mixed("allgather", tp=2, etp=1, sequence_parallel=True, reduction="plain"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("index-cache")


@functools.cache
def alone(cache, more):
    return run(Layout(model="moe", experts=more), cache)


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradients_equal_those_of_one_rank(name, cache):
    layout = LAYOUTS[name]
    worst = worst_difference(run(layout, cache), alone(cache, GROUPED if GROUPED in layout.experts else ""))
    assert worst.pop("loss") < 1e-5
    assert len(worst) > 40
    assert max(worst.values()) < 1e-4, {name: each for name, each in worst.items() if each >= 1e-4}
