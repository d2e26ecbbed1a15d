"""Dropout masks of a step of the real loop: two ranks draw the same mask exactly where they hold the same
activations.
"""

import contextlib
import itertools
from unittest import mock

import pytest
import torch

from tests.distributed import real_loop
from tests.distributed.gpt_run import command_line
from tests.distributed.layouts import LAYERS, SEQUENCE, Layout
from tests.distributed.pool import run_ranks

P = 0.5
EXTRA = (
    f"--attention-dropout {P} --hidden-dropout {P} --train-iters 1 --micro-batch-size 1 --global-batch-size 1"
)
HIDDEN = 32


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def drawn(argv):
    """On a rank: the masks in the order of drawing, of hidden states and of attention weights."""
    from megatron.core.fusions import block_attention, fused_attention, fused_bias_dropout

    masks = {"hidden": [], "attention": []}
    rooms = (
        ("hidden", fused_bias_dropout),
        ("attention", fused_attention),
        ("attention", block_attention),  # a sequence that is split over ranks
    )

    def recording(kind, make):
        def record(*args, **kwargs):
            keep, scale = make(*args, **kwargs)
            masks[kind].append(keep.clone())
            return keep, scale

        return record

    with contextlib.ExitStack() as stack:
        for kind, module in rooms:
            stack.enter_context(mock.patch.object(module, "keep_mask", recording(kind, module.keep_mask)))
        real_loop.train(argv, with_gradients=False)
    return masks


def masks_of(layout, data_cache):
    by_rank = run_ranks(layout.world_size, drawn, command_line(layout, data_cache, EXTRA))
    for masks in by_rank:
        # After the embedding, and twice in every layer; attention makes its mask once more in backward.
        assert len(masks["hidden"]) == 1 + 2 * LAYERS
        assert len(masks["attention"]) >= LAYERS
    return by_rank


def agreement(left, right):
    return float((left == right).float().mean())


def assert_independent(left, right, where):
    """Fair coins agree half of the time; five standard deviations are allowed."""
    assert abs(agreement(left, right) - 0.5) < 5 * 0.5 / left.numel() ** 0.5, where


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_masks_differ_where_activations_are_split_and_only_there(sequence_parallel, data_cache):
    layout = Layout(tp=2, sequence_parallel=sequence_parallel)
    first, second = masks_of(layout, data_cache)
    length = SEQUENCE // (2 if sequence_parallel else 1)
    for index, (left, right) in enumerate(zip(first["hidden"], second["hidden"], strict=True)):
        assert left.shape == (length, 1, HIDDEN)
        if sequence_parallel:
            assert_independent(left, right, index)
        else:
            assert torch.equal(left, right), index
    for index, (left, right) in enumerate(zip(first["attention"], second["attention"], strict=True)):
        # Heads are split, with and without sequence parallelism.
        assert_independent(left, right, index)


def test_no_two_places_share_a_mask(data_cache):
    (masks,) = masks_of(Layout(), data_cache)
    hidden = masks["hidden"]
    for index, left in enumerate(hidden):
        for right in hidden[index + 1 :]:
            assert_independent(left, right, index)


def test_stages_draw_masks_of_their_own(data_cache):
    layout = Layout(pp=2)
    first, second = run_ranks(2, drawn, command_line(layout, data_cache, EXTRA))
    # The first mask of the first stage is the embedding's.
    for index, (left, right) in enumerate(zip(first["hidden"][1:], second["hidden"], strict=True)):
        assert_independent(left, right, index)
    for left in first["hidden"]:
        assert not any(torch.equal(left, right) for right in second["hidden"])


def coordinates(layout, rank):
    """(tp, cp, dp, pp) of a rank; the first changes fastest, which is the documented order."""
    found = []
    for size in (layout.tp, layout.cp, layout.dp, layout.pp):
        found.append(rank % size)
        rank //= size
    return tuple(found)


REPLICAS = [
    Layout(dp=2),
    Layout(dp=4),
    Layout(cp=2),
    Layout(cp=2, context="all_gather"),
    Layout(cp=2, context="a2a"),
    Layout(dp=2, cp=2),
    Layout(tp=2, dp=2),
    Layout(tp=2, dp=2, sequence_parallel=True, reduction="sharded-overlap-both"),
    Layout(tp=2, cp=2, dp=2),
    Layout(pp=2, dp=2),
    Layout(pp=2, vpp=2, cp=2),
]


@pytest.mark.parametrize("layout", REPLICAS, ids=str)
def test_ranks_with_the_same_weights_draw_masks_of_their_own(layout, data_cache):
    extra = f"{EXTRA} --global-batch-size {2 * layout.dp}"
    by_rank = run_ranks(layout.world_size, drawn, command_line(layout, data_cache, extra))
    ranks = [(coordinates(layout, rank), masks) for rank, masks in enumerate(by_rank)]
    for (one, left), (other, right) in itertools.combinations(ranks, 2):
        if one[3] != other[3]:  # stages hold other layers; the test above compares them
            continue
        assert len(left["hidden"]) == len(right["hidden"]) > 0
        for index, (a, b) in enumerate(zip(left["hidden"], right["hidden"], strict=True)):
            if one[1:] == other[1:] and not layout.sequence_parallel:
                assert torch.equal(a, b), (one, other, index)
            else:
                assert_independent(a, b, (one, other, index))
        # Ranks that share a sequence see different numbers of blocks of it.
        comparable = [
            (a, b) for a, b in itertools.product(left["attention"], right["attention"]) if a.shape == b.shape
        ]
        assert comparable
        for a, b in comparable:
            assert_independent(a, b, (one, other))


def test_recomputation_repeats_the_masks_of_every_rank(data_cache):
    layout = Layout(dp=2, cp=2)
    extra = f"{EXTRA} --global-batch-size 2"
    full = " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    plain, again = (
        run_ranks(4, drawn, command_line(layout, data_cache, extra + words)) for words in ("", full)
    )
    for before, after in zip(plain, again, strict=True):
        embedding, *layers = before["hidden"]
        found = after["hidden"]
        assert len(found) == 1 + 2 * len(layers)
        forward, backward = found[: 1 + len(layers)], found[1 + len(layers) :]
        for index, (mask, expected) in enumerate(zip(forward, [embedding, *layers], strict=True)):
            assert torch.equal(mask, expected), index
        # Layers come back last first, each with its two masks in the order of drawing.
        for layer in range(LAYERS):
            for place in (0, 1):
                replayed = backward[2 * (LAYERS - 1 - layer) + place]
                assert torch.equal(replayed, layers[2 * layer + place]), (layer, place)


def test_every_step_and_microbatch_has_masks_of_its_own(data_cache):
    layout = Layout(dp=2)
    # The weights of the two start, and stay, the same.
    hashes = "--check-weight-hash-across-dp-replicas-interval 1"
    extra = f"{EXTRA} --global-batch-size 4 --train-iters 2 {hashes}"
    for masks in run_ranks(2, drawn, command_line(layout, data_cache, extra)):
        hidden = masks["hidden"]
        assert len(hidden) == 2 * 2 * (1 + 2 * LAYERS)
        for left, right in itertools.combinations(hidden, 2):
            assert_independent(left, right, "hidden")
