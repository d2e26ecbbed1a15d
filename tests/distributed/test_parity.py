"""Every layout gives the losses and gradients of one rank, through the real ``pretrain_gpt.py``."""

from functools import cache

import pytest

from tests.distributed.gpt_run import run, worst_difference
from tests.distributed.layouts import STEPS, Layout, bare_layouts, spread, with_flags

LOSS_TOLERANCE = 1e-5
# Ten times the rounding seen, and a third of the 1e-4 that is promised.
GRADIENT_TOLERANCE = 3e-5


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@cache
def reference(model, data_cache):
    """The run on one rank, checked to be one whose steps differ."""
    result = run(Layout(model=model), data_cache)
    (losses,) = result.losses
    assert len(set(losses)) == STEPS and result.records[0].grad_norms[0] > 0.1, losses
    return result


def check(layout, data_cache):
    worst = worst_difference(run(layout, data_cache), reference(layout.model, data_cache))
    loss = worst.pop("loss")
    name = max(worst, key=worst.get)
    print(f"{layout}: loss {loss:.1e}, gradients {worst[name]:.1e} ({name})")
    assert loss < LOSS_TOLERANCE
    too_far = {name: f"{value:.1e}" for name, value in worst.items() if value >= GRADIENT_TOLERANCE}
    assert not too_far


@pytest.mark.parametrize("layout", spread(bare_layouts()), ids=str)
def test_each_layout_once(layout, data_cache):
    check(layout, data_cache)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [each for bare in bare_layouts() for each in with_flags(bare)], ids=str)
def test_each_layout_with_every_combination_of_flags(layout, data_cache):
    check(layout, data_cache)
