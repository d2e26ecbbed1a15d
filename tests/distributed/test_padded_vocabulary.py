"""GPT-2's 50,257 ids over tensor-parallel ranks: equal losses at equal padded sizes."""

import math
import re

import pytest

from tests.distributed.gpt_run import NO_DROPOUT, command_line
from tests.distributed.layouts import Layout
from tests.distributed.pool import run_ranks
from tests.distributed.real_loop import train

IDS = 50257
STEPS = 2


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def losses(tp, divisible_by, data_cache, std="0.15"):
    """Losses of the steps, and the padded size."""
    flags = f"--vocab-size {IDS - 1} --make-vocab-size-divisible-by {divisible_by} --train-iters {STEPS}"
    argv = command_line(Layout(tp=tp), data_cache, f"{NO_DROPOUT} {flags} --init-method-std {std}")
    records = run_ranks(tp, train, argv, False)
    (size,) = re.findall(rf"padded vocab \(size: {IDS}\) .*\(new size: (\d+)\)", records[0].output)
    return records[-1].losses, int(size)


@pytest.mark.parametrize("tp", [2, 4])
def test_equal_padded_sizes_give_equal_losses(tp, data_cache):
    expected, size = losses(1, 128, data_cache)
    found, split_size = losses(tp, 128 // tp, data_cache)
    assert size == split_size == 50304
    assert found == pytest.approx(expected, rel=1e-6)


def test_dummy_ids_share_in_the_softmax(data_cache):
    """With weights near zero all logits are equal, so the first loss is the logarithm of the padded size."""
    for tp, padded in ((1, 50304), (2, 50432), (4, 50688)):
        found, size = losses(tp, 128, data_cache, std="1e-6")
        assert size == padded
        assert found[0] == pytest.approx(math.log(padded), rel=1e-6)
