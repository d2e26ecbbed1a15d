"""The vectorised sample index against a walk through the sequences."""

import math

import numpy as np
import pytest

from megatron.core.datasets import helpers, helpers_cpp


def walk(sizes, order, length, total, drop_last, extra):
    """Row by row: consume length + extra tokens, step back by extra."""
    usable = total - extra
    samples = usable // length if drop_last else math.ceil(np.float32(usable) / np.float32(length))
    rows, place, offset = [(0, 0)], 0, 0
    for _ in range(samples):
        need = length + extra
        while need > 0:
            rest = sizes[order[place]] - offset
            need -= rest
            if need <= 0:
                offset += need + rest - extra
                break
            if place == len(order) - 1:
                offset = sizes[order[place]] - extra
                break
            place, offset = place + 1, 0
        rows.append((place, offset))
    return rows


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_sample_index_equals_that_of_a_token_by_token_walk(seed, drop_last, extra):
    random = np.random.default_rng(seed)
    sizes = random.integers(0 if seed % 2 else 1, 12, size=20).astype(np.int32)
    sizes[-1] += 1
    epochs = int(random.integers(1, 4))
    order = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    random.shuffle(order)
    length = int(random.integers(1, 30))
    per_epoch = int(sizes.sum())
    rows = helpers.build_sample_idx(sizes, order, length, epochs, per_epoch, drop_last, bool(extra))
    assert rows.dtype == np.int32
    assert list(map(tuple, rows.tolist())) == walk(sizes, order, length, epochs * per_epoch, drop_last, extra)


def test_documented_names_and_types():
    sizes, order = np.array([5, 7], dtype=np.int32), np.array([1, 0], dtype=np.int32)
    narrow = helpers_cpp.build_sample_idx_int32(sizes, order, 3, 1, 12, True, True)
    wide = helpers.build_sample_idx_int64(sizes, order, 3, 1, 12)
    assert (narrow.dtype, wide.dtype) == (np.int32, np.int64)
    assert narrow.tolist() == wide.tolist() == [[0, 0], [0, 3], [0, 6], [1, 2]]


def test_fewer_tokens_than_a_sample():
    sizes, order = np.array([2], dtype=np.int32), np.array([0], dtype=np.int32)
    assert helpers.build_sample_idx(sizes, order, 8, 1, 2).tolist() == [[0, 0]]


def test_rows_widen_only_where_a_position_in_a_sequence_does_not_fit():
    order = np.array([0], dtype=np.int32)
    for length, dtype in ((2**31 - 1, np.int32), (2**31, np.int64)):
        sizes = np.array([length], dtype=np.int64)
        rows = helpers.build_sample_idx(sizes, order, 2**30, 1, length)
        assert (rows.dtype, rows[1].tolist()) == (dtype, [0, 2**30])
