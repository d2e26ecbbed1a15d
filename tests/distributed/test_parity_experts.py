"""Experts spread over ranks train as on one rank: losses and every gradient, through ``pretrain_gpt.py``."""

from dataclasses import replace
from functools import cache

import pytest

from tests.distributed.expert_layouts import BARES, LARGE, name_of, pairs_of_flags, spread
from tests.distributed.gpt_run import NO_DROPOUT, run, worst_difference
from tests.distributed.layouts import Layout

# Promised; what was seen is ten times smaller.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@cache
def reference(words, data_cache):
    """The run on one rank, one expert after the other."""
    return run(Layout(model="moe"), data_cache, f"{NO_DROPOUT} {words}")


def check(layout, flags, data_cache):
    layout = replace(layout, reduction=flags.reduction, experts=flags.alone())
    found = run(layout, data_cache, f"{NO_DROPOUT} {flags.everywhere()}")
    worst = worst_difference(found, reference(flags.everywhere(), data_cache))
    print(name_of((layout, flags)), {key: f"{worst[key]:.1e}" for key in sorted(worst, key=worst.get)[-2:]})
    assert sum(".experts." in name for name in worst) >= 2 * 2 * 4  # matmuls, layers, experts
    assert worst.pop("loss") < LOSS_TOLERANCE
    norms = reference(flags.everywhere(), data_cache).records[0].grad_norms
    for record in found.records:
        assert record.grad_norms == pytest.approx(norms, rel=LOSS_TOLERANCE)
    too_far = {name: f"{value:.1e}" for name, value in worst.items() if value >= GRADIENT_TOLERANCE}
    assert not too_far


FAST = spread(BARES, pairs_of_flags)
MORE = [each for each in [*spread(BARES), *spread(LARGE, pairs_of_flags)] if each not in FAST]


@pytest.mark.parametrize("layout, flags", FAST, ids=map(name_of, FAST))
def test_experts_train_as_on_one_rank(layout, flags, data_cache):
    check(layout, flags, data_cache)


@pytest.mark.slow
@pytest.mark.parametrize("layout, flags", MORE, ids=map(name_of, MORE))
def test_more_layouts_of_experts_train_as_on_one_rank(layout, flags, data_cache):
    check(layout, flags, data_cache)
