"""Batch sizes: fixed, rounded down, growing."""

import logging

import pytest

from megatron.core import num_microbatches_calculator as calculators
from megatron.core.errors import ConfigError


@pytest.fixture(autouse=True)
def unset() -> None:
    calculators.unset_num_microbatches_calculator()
    yield
    calculators.unset_num_microbatches_calculator()


def sizes() -> tuple[int, int, int, int]:
    return (
        calculators.get_num_microbatches(),
        calculators.get_current_global_batch_size(),
        calculators.get_current_running_global_batch_size(),
        calculators.get_micro_batch_size(),
    )


def test_number_of_microbatches_is_constant_without_ramp_up() -> None:
    calculators.init_num_microbatches_calculator(0, None, 32, 4, 2)
    assert sizes() == (4, 32, 32, 4)
    calculators.update_num_microbatches(10_000)
    assert sizes() == (4, 32, 32, 4)


def test_constant_rounded_down() -> None:
    calculators.init_num_microbatches_calculator(0, None, 30, 4, 2, decrease_batch_size_if_needed=True)
    assert sizes() == (3, 30, 24, 4)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (30, ["4 x data-parallel size 2 = 8", "use 24 or 32", "decrease_batch_size_if_needed to run 24"]),
        (5, ["use 8"]),
        (0, ["global_batch_size 0"]),
    ],
)
def test_misfits_name_sizes_that_work(size: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        calculators.init_num_microbatches_calculator(0, None, size, 4, 2)
    for word in words:
        assert word in str(error.value)


def test_a_step_needs_one_micro_batch_even_when_rounding() -> None:
    with pytest.raises(ConfigError, match="use 8"):
        calculators.init_num_microbatches_calculator(0, None, 5, 4, 2, decrease_batch_size_if_needed=True)


def test_ramp_of_the_reference_run() -> None:
    """48 samples, ramp 4 2 16, batch 8: seven iterations and 44 samples (verified on core_v0.12.1)."""
    calculators.init_num_microbatches_calculator(0, [4, 2, 16], 8, 2, 1)
    consumed, batches = 0, []
    while consumed < 48:
        calculators.update_num_microbatches(consumed)
        if consumed + calculators.get_current_global_batch_size() > 48:
            break
        batches.append(calculators.get_current_global_batch_size())
        consumed += batches[-1]
    # two rises, one per eight samples
    assert batches == [4, 4, 6, 6, 8, 8, 8]
    assert consumed == 44


@pytest.mark.parametrize(
    ("consumed", "size"),
    [(0, 32), (99, 32), (100, 48), (199, 48), (299, 64), (300, 80), (301, 80), (9999, 80)],
)
def test_ramp_by_hand(consumed: int, size: int) -> None:
    """From 32 to 80 in steps of 16 over 300 samples: three rises, one per 100 samples."""
    calculators.init_num_microbatches_calculator(0, [32, 16, 300], 80, 8, 2)
    calculators.update_num_microbatches(consumed)
    assert sizes() == (size // 16, size, size, 8)


def test_ramp_checks_sizes_only_when_asked() -> None:
    calculators.init_num_microbatches_calculator(0, [4, 2, 16], 8, 4, 1)
    calculators.update_num_microbatches(8, consistency_check=False)
    assert calculators.get_current_global_batch_size() == 6
    with pytest.raises(ConfigError, match="use 4 or 8"):
        calculators.update_num_microbatches(8, consistency_check=True)


def test_ramp_rounded_down() -> None:
    calculators.init_num_microbatches_calculator(0, [4, 2, 16], 8, 4, 1, True)
    calculators.update_num_microbatches(8)
    assert sizes() == (1, 6, 4, 4)


@pytest.mark.parametrize("ramp", [[8, 2, 16], [4, 2, 0]])
def test_ramps_without_length(ramp: list[int]) -> None:
    calculators.init_num_microbatches_calculator(0, ramp, 8, 2, 1)
    assert calculators.get_current_global_batch_size() == 8


@pytest.mark.parametrize(
    ("ramp", "words"),
    [
        ([4, 2], "three are needed"),
        ([4, 3, 16], "7 and 10: use one of these, or an increment that divides 4$"),
        ([10, 2, 16], "between 1 and global_batch_size 8"),
        ([4, 0, 16], "increment 0"),
        ([4, 2, -1], "0 samples or more"),
    ],
)
def test_impossible_ramps(ramp: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        calculators.init_num_microbatches_calculator(0, ramp, 8, 2, 1)


def test_one_calculator_per_process() -> None:
    with pytest.raises(ConfigError, match="init_num_microbatches_calculator"):
        calculators.get_num_microbatches()
    calculators.init_num_microbatches_calculator(0, None, 8, 2, 1)
    with pytest.raises(ConfigError, match="reconfigure"):
        calculators.init_num_microbatches_calculator(0, None, 8, 2, 1)
    calculators.reconfigure_num_microbatches_calculator(0, None, 16, 2, 1)
    assert calculators.get_num_microbatches() == 8


def test_only_rank_zero_logs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        calculators.reconfigure_num_microbatches_calculator(1, [4, 2, 16], 8, 2, 1)
        assert not caplog.messages
        calculators.reconfigure_num_microbatches_calculator(0, [4, 2, 16], 8, 2, 1)
    assert caplog.messages[-1] == "setting initial batch size to 4"


@pytest.mark.parametrize(("rank", "verbose", "told"), [(0, True, 2), (0, False, 0), (1, True, 0)])
def test_a_rise_is_told_once_by_one_rank(rank, verbose, told, caplog):
    calculator = calculators.RampupBatchsizeNumMicroBatchesCalculator(12, 2, 2, False, rank, 4, 4, 16)
    caplog.clear()
    with caplog.at_level("INFO"):
        for consumed in (0, 4, 9, 12, 17, 30):
            calculator.update(consumed, False, verbose)
    assert [r.getMessage() for r in caplog.records] == [
        f"ramping up batch size from {old} to {old + 4}" for old in (4, 8)[:told]
    ]
