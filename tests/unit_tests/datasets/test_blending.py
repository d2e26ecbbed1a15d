"""Blending indices: golden figures, and the lanes against one step at a time."""

import json
import time

import numpy as np
import pytest

from megatron.core.datasets import blending_index, helpers
from megatron.core.datasets.blending_index import greedy_choices, sample_numbers


def step_by_step(weights: np.ndarray, size: int, capacity: np.ndarray | None = None) -> list[int]:
    """The rule as it is defined."""
    taken = np.zeros(len(weights))
    choices = []
    for step in range(size):
        error = weights * max(step, 1) - taken
        if capacity is not None:
            error[taken >= capacity] = -np.inf
        best = int(np.argmax(error))  # the first of equals
        taken[best] += 1
        choices.append(best)
    return choices


def test_blending_index_equals_golden_files(data):
    for case in json.loads((data / "blend_raw.json").read_text()).values():
        size = len(case["dataset_index"])
        index, sample = np.full(size, -1, dtype=np.int16), np.full(size, -1, dtype=np.int64)
        if "weights" in case:
            weights = np.array(case["weights"])
            helpers.build_blending_indices(index, sample, weights, len(weights), case["size"], False)
        else:
            sizes = np.array(case["exhaustive_sizes"], dtype=np.int64)
            helpers.build_exhaustive_blending_indices(index, sample, sizes, len(sizes))
        assert index.tolist() == case["dataset_index"]
        assert sample.tolist() == case["dataset_sample_index"]


TIES_AND_ODDITIES = {
    "equal": [1, 1, 1],
    "seven equal": [1] * 7,
    "powers of two": [8, 4, 2, 1, 1],
    "small ratios": [5, 3, 2],
    "one": [1],
    "rare": [1, 150, 850],
    "twins": [1, 1, 2, 4, 4],
    "decimal": [0.1, 0.2, 0.7],
    "many": list(range(1, 31)),
}


@pytest.mark.parametrize("name", TIES_AND_ODDITIES)
@pytest.mark.parametrize("exhaustive", [False, True])
def test_lanes_equal_steps(name, exhaustive):
    weights = np.array(TIES_AND_ODDITIES[name], dtype=np.float64)
    weights /= weights.sum()
    size, capacity = 20_001, None
    if exhaustive:
        capacity = np.maximum(1, (weights * size).astype(np.int64))
        size = int(capacity.sum())
        weights = capacity / size
    choices = greedy_choices(weights, size, capacity)
    assert choices.dtype == np.int16
    assert choices.tolist() == step_by_step(weights, size, capacity)


@pytest.mark.parametrize("size", [20_000, 90_000])  # narrow batches of lanes, and wide ones
def test_members_that_run_out_early(size):
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    capacity = np.array([0.2, 0.3, 0.3, 0.2]) * size
    choices = greedy_choices(weights, size, capacity.astype(np.int64))
    assert choices.tolist() == step_by_step(weights, size, capacity)


def random_weights(random: np.random.Generator) -> np.ndarray:
    members = int(random.integers(2, 12))
    kinds = (
        lambda: random.random(members) + 1e-3,
        lambda: random.integers(1, 8, members).astype(float),
        lambda: 2.0 ** -random.integers(0, 6, members),
        lambda: random.dirichlet(np.ones(members)) + 2e-3,
    )
    weights = kinds[random.integers(len(kinds))]()
    return weights / weights.sum()


def check_random(seed: int, size: int) -> None:
    random = np.random.default_rng(seed)
    weights = random_weights(random)
    assert greedy_choices(weights, size).tolist() == step_by_step(weights, size)
    capacity = random.integers(1, 2 * size // len(weights), len(weights))
    total = int(capacity.sum())
    assert greedy_choices(capacity / total, total, capacity).tolist() == step_by_step(
        capacity / total, total, capacity
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_weights(seed):
    check_random(seed, 9_000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 300))
def test_many_random_weights(seed):
    check_random(seed, 40_000)


def test_wrong_guesses_are_put_right(monkeypatch):
    """Lanes that start from nonsense are replayed, and walked if that does not help."""
    weights = np.array([0.5, 0.31, 0.19])
    expected = step_by_step(weights, 30_000)

    def nonsense(weights, steps, capacity):
        guess = np.zeros((len(weights), len(steps)))
        guess[-1] = steps
        return guess

    calls = []
    replay, walk = blending_index._replay, blending_index._walk
    monkeypatch.setattr(blending_index, "_guess_counts", nonsense)
    monkeypatch.setattr(blending_index, "_replay", lambda *a: (calls.append("replay"), replay(*a)))
    monkeypatch.setattr(blending_index, "_walk", lambda *a: (calls.append("walk"), walk(*a)))
    assert greedy_choices(weights, 30_000).tolist() == expected
    assert calls == ["replay"] * blending_index._MAX_ROUNDS + ["walk"]


def test_sample_numbers():
    choices = np.array([2, 0, 2, 2, 0, 1], dtype=np.int16)
    assert sample_numbers(choices, 4).tolist() == [0, 0, 1, 2, 1, 0]


def test_ten_million_samples_in_seconds():
    weights = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    index, sample = np.empty(10**7, dtype=np.int16), np.empty(10**7, dtype=np.int64)
    start = time.process_time()
    helpers.build_blending_indices(index, sample, weights, 5, 10**7)
    assert time.process_time() - start < 10
    assert index[:20_000].tolist() == step_by_step(weights, 20_000)
    assert np.abs(np.bincount(index) - weights * 10**7).max() <= 1
