"""The choice of layouts: nothing the promise names is missing from it."""

import itertools

from tests.distributed.layouts import Layout, bare_layouts, pairs, spread, with_flags


def test_all_sizes_with_a_world_of_at_most_eight_are_there():
    found = {tuple(layout.sizes.values()) for layout in bare_layouts()}
    powers = (1, 2, 4, 8)
    for tp, pp, cp, dp in itertools.product(powers, repeat=4):
        # Four layers do not go into eight stages.
        if tp * pp * cp * dp <= 8 and pp <= 4:
            assert (tp, pp, 1, cp, dp) in found
            if pp == 2:
                assert (tp, pp, 2, cp, dp) in found
    assert len(found) == len(bare_layouts())


def test_the_fast_set_has_every_layout_and_every_pair_of_settings():
    fast = spread(bare_layouts())
    assert {tuple(layout.sizes.values()) for layout in fast} == {
        tuple(layout.sizes.values()) for layout in bare_layouts()
    }
    possible = set().union(*(pairs(layout) for bare in bare_layouts() for layout in with_flags(bare)))
    assert not possible - set().union(*map(pairs, fast))
    assert fast == spread(bare_layouts())
    assert len(fast) < 60  # seconds each


def test_combinations_that_do_not_exist_are_left_out():
    assert not Layout(pp=2, vpp=2, pipeline="zb-h1").makes_sense()
    assert not Layout(tp=1, sequence_parallel=True).makes_sense()
    assert not Layout(pp=8).makes_sense()
    assert not Layout(cp=2, context="a2a+p2p").makes_sense()
    assert Layout(pp=3, stages="account").makes_sense()
