"""Which chunks a rank holds, from tables written by hand."""

import pytest
import torch

from megatron.core.context_parallel.plan import (
    all_segments,
    local_segments,
    plan_blocks,
    ring_hops,
    visible_band,
)
from megatron.core.context_parallel.zigzag import own_place, take_chunks, to_rank_order, to_sequence_order
from megatron.core.errors import ConfigError
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.utils import get_batch_on_this_cp_rank
from tests.distributed.pool import run_ranks
from tests.unit_tests.context_parallel.split_world import start

# Positions of a sequence of 8 by ranks, and of 16 (two positions a chunk) for four.
TABLES = {
    1: [[0, 1, 2, 3, 4, 5, 6, 7]],
    2: [[0, 1, 6, 7], [2, 3, 4, 5]],
    4: [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]],
}


@pytest.mark.parametrize("size", TABLES)
def test_take_chunks(size):
    length = 4 * size if size > 1 else 8
    whole = torch.arange(length)
    for rank, positions in enumerate(TABLES[size]):
        assert take_chunks(whole, 0, rank, size).tolist() == positions
        columns = take_chunks(whole.expand(3, length), -1, rank, size)
        assert columns.tolist() == [positions] * 3


def test_a_process_without_groups_holds_the_whole_sequence():
    assert own_place() == (0, 1)


def test_orders_are_inverse():
    parts = torch.tensor(TABLES[4])
    assert to_sequence_order(parts).tolist() == list(range(16))
    assert to_rank_order(torch.arange(16), 4).tolist() == TABLES[4]


def test_neighbouring_ranks_together_hold_the_part_of_one_rank_of_half_as_many():
    parts = torch.tensor(TABLES[4])
    assert to_sequence_order(parts[:2]).tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert to_sequence_order(parts[2:]).tolist() == [4, 5, 6, 7, 8, 9, 10, 11]


def test_length_that_does_not_divide():
    with pytest.raises(ConfigError, match="sequence_length 16"):
        take_chunks(torch.arange(10), 0, 0, 4)


def batch_of_rank():
    rank, size = start(torch.distributed.get_world_size()), torch.distributed.get_world_size()
    length = 4 * size
    tokens = torch.arange(length).expand(2, length)
    batch = {
        "tokens": tokens,
        "labels": tokens + 1,
        "loss_mask": None,
        "attention_mask": torch.arange(length * length).view(1, 1, length, length),
        "position_ids": tokens,
    }
    mine = get_batch_on_this_cp_rank(batch)
    table = RotaryEmbedding(8, 1.0)
    return rank, mine, get_pos_emb_on_this_cp_rank(tokens.T, 0), table(length), table(length, packed_seq=True)


@pytest.mark.parametrize("size", [2, 4])
def test_batch_and_angles(size):
    for rank, mine, positions, angles, packed in run_ranks(size, batch_of_rank):
        expected = TABLES[size][rank]
        assert mine["tokens"].tolist() == mine["position_ids"].tolist() == [expected] * 2
        assert mine["labels"].tolist() == [[p + 1 for p in expected]] * 2
        assert mine["loss_mask"] is None
        rows = [[p * 4 * size + key for key in range(4 * size)] for p in expected]
        assert mine["attention_mask"].tolist() == [[rows]]
        assert positions.T.tolist() == [expected] * 2
        # The first channel of a head turns by one radian per position.
        assert angles[:, 0, 0, 0].tolist() == expected
        assert packed[:, 0, 0, 0].tolist() == list(range(4 * size))


WINDOWS = (None, (0, 0), (1, 0), (3, 2), (5, -1), (-1, 4), (40, 0), (7, 7))


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_cover_what_is_visible_once(size, causal, joined):
    local = 6
    length = size * local
    whole = all_segments(size, local)
    parts = [local_segments(rank, size, local) for rank in range(size)]
    for window in WINDOWS:
        band = visible_band(causal, window)
        left, right = window or (-1, -1)
        seen = torch.zeros(2, length, length, dtype=torch.long)
        for queries in parts:
            for number, keys in [(0, keys) for keys in parts] + [(1, whole)]:
                count(seen[number], queries, keys, plan_blocks(queries, keys, band, joined))
        for i in range(length):
            for j in range(length):
                hidden = (causal and j > i) or (0 <= left < i - j) or (0 <= right < j - i)
                assert seen[:, i, j].tolist() == [1 - hidden] * 2, (window, i, j)


def test_neighbouring_rows_over_the_same_keys_are_one_block():
    mine, earlier = local_segments(1, 2, 8), local_segments(0, 2, 8)
    (task,) = plan_blocks(mine, earlier, visible_band(True, None))
    assert (task.queries, task.keys) == (slice(0, 8), slice(0, 4))
    assert len(plan_blocks(mine, earlier, visible_band(True, None), joined=False)) == 2


def count(seen, queries, keys, tasks):
    """Adds one for each pair of positions that ``tasks`` compute."""
    rows, columns = ([s.position + k for s in part for k in range(s.length)] for part in (queries, keys))
    for task in tasks:
        left, right = task.band
        for i, row in enumerate(rows[task.queries]):
            for j, column in enumerate(columns[task.keys]):
                inside = (left is None or j >= i - left) and (right is None or j <= i + right)
                seen[row, column] += inside


def test_causal_work_is_equal():
    """Every rank computes the same number of scores: the reason for the zigzag."""
    size, local = 4, 8
    work = []
    for rank in range(size):
        seen = torch.zeros(size * local, size * local, dtype=torch.long)
        mine, whole = local_segments(rank, size, local), all_segments(size, local)
        count(seen, mine, whole, plan_blocks(mine, whole, visible_band(True, None)))
        work.append(int(seen.sum()))
    assert work == [sum(range(1, 33)) // 4] * 4


@pytest.mark.parametrize(
    ("size", "causal", "window", "hops"),
    [
        (1, True, None, (0, 0)),
        (2, True, None, (1, 0)),
        (8, True, None, (7, 0)),
        (8, False, None, (7, 0)),
        # Within a chunk of 4: only neighbours in the sequence, which are neighbours in the ring.
        (8, True, (4, 0), (1, 1)),
        (8, False, (4, 4), (1, 1)),
        # Two chunks back.
        (8, True, (5, 0), (2, 2)),
        (4, True, (9, 0), (3, 0)),
        (8, True, (0, 0), (0, 0)),
    ],
)
def test_hops(size, causal, window, hops):
    assert ring_hops(size, 8, visible_band(causal, window)) == hops
