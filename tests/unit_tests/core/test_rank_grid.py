"""The rank grid against worked layouts of 16 ranks."""

import pytest

from megatron.core.errors import ConfigError
from megatron.core.rank_grid import RankGenerator, generate_masked_orthogonal_rank_groups, levels_of


def starts(groups, *expected):
    return groups[: len(expected)] == [list(group) for group in expected]


@pytest.mark.parametrize(
    ("sizes", "token", "expected"),
    [
        (dict(tp=2, dp=2, pp=4), "tp", [(0, 1), (2, 3)]),
        (dict(tp=2, dp=2, pp=4), "dp", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        (dict(tp=2, dp=2, pp=4), "pp", [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]),
        (dict(tp=2, dp=2, pp=4), "tp-pp", [(0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15)]),
        (dict(tp=2, cp=2, dp=2, pp=2), "cp", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        (dict(tp=2, cp=2, dp=2, pp=2), "dp", [(0, 4), (1, 5), (2, 6), (3, 7), (8, 12)]),
        (dict(tp=2, cp=2, dp=2, pp=2), "dp-cp", [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14)]),
        (dict(tp=2, cp=2, dp=2, pp=2), "tp-cp", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (dict(tp=2, cp=2, dp=2, pp=2), "tp-dp", [(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13)]),
        (dict(ep=2, dp=4, pp=2), "ep", [(0, 1), (2, 3)]),
        (dict(ep=2, dp=4, pp=2), "dp", [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14)]),
        (dict(ep=2, dp=4, pp=2), "tp-ep-pp", [(0, 1, 8, 9), (2, 3, 10, 11), (4, 5, 12, 13)]),
        (dict(tp=2, ep=2, dp=2, pp=2), "ep", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        (dict(tp=2, ep=2, dp=2, pp=2), "dp", [(0, 4), (1, 5), (2, 6), (3, 7)]),
    ],
)
def test_worked_layouts(sizes, token, expected):
    full = dict(tp=1, ep=1, dp=1, pp=1, cp=1) | sizes
    generator = RankGenerator(**full, order="tp-cp-ep-dp-pp")
    groups = generator.get_ranks(token)
    assert starts(groups, *expected)
    assert sorted(rank for group in groups for rank in group) == list(range(16))


def test_pipeline_before_data():
    generator = RankGenerator(tp=2, ep=1, dp=4, pp=2, cp=1, order="tp-cp-ep-pp-dp")
    assert starts(generator.get_ranks("dp"), (0, 4, 8, 12), (1, 5, 9, 13))
    assert starts(generator.get_ranks("pp"), (0, 2), (1, 3), (4, 6), (5, 7))


def test_offset_moves_every_rank():
    generator = RankGenerator(tp=2, ep=1, dp=2, pp=1, cp=1, order="tp-dp", rank_offset=6)
    assert generator.get_ranks("tp") == [[6, 7], [8, 9]]


def test_axes_left_out_must_have_size_one():
    with pytest.raises(ConfigError, match="leaves out pp, whose size is 2"):
        RankGenerator(tp=2, ep=1, dp=2, pp=2, cp=1, order="tp-dp")


def test_experts_and_context_need_separate_grids():
    with pytest.raises(ConfigError, match="grid of their own"):
        RankGenerator(tp=1, ep=2, dp=1, pp=1, cp=2, order="tp-cp-ep-dp-pp")


def test_masked_groups_repeat_over_a_larger_world():
    assert generate_masked_orthogonal_rank_groups(8, [2, 2], [True, False]) == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", "pp-dp-ep-cp-tp"])
@pytest.mark.parametrize("sizes", [dict(tp=2, cp=3, dp=2, pp=2), dict(tp=3, ep=2, dp=2, pp=4)])
@pytest.mark.parametrize("token", ["tp", "pp", "dp-cp", "tp-pp", "tp-dp-cp", "ep", "tp-ep-pp"])
def test_one_group_is_found_without_the_others(order, sizes, token):
    generator = RankGenerator(**(dict(tp=1, ep=1, dp=1, pp=1, cp=1) | sizes), order=order, rank_offset=5)
    for group in generator.get_ranks(token):
        for rank in group:
            assert generator.get_group(token, rank) == group


def test_levels_start_with_neighbours():
    ranks = [10, 12, 14, 16, 18, 20]
    assert levels_of(ranks, [2, 3], 16) == [[14, 16], [12, 16, 20]]
    assert levels_of(ranks, [3, 2], 16) == [[16, 18, 20], [10, 16]]
    assert levels_of(list(range(8)), [2, 2, 2], 6) == [[6, 7], [4, 6], [2, 6]]
    with pytest.raises(ConfigError, match="multiply to 4"):
        levels_of(ranks, [2, 2], 10)
