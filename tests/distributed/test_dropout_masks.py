"""Dropout masks of a step of the real loop: tensor-parallel ranks draw different ones exactly where they hold
different parts of the activations."""

import contextlib
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
    from megatron.core.fusions import attention_dropout, dropout

    masks = {"hidden": [], "attention": []}

    def recording(kind, make):
        def record(*args, **kwargs):
            keep, scale = make(*args, **kwargs)
            masks[kind].append(keep.clone())
            return keep, scale

        return record

    with contextlib.ExitStack() as stack:
        for kind, module in (("hidden", dropout), ("attention", attention_dropout)):
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
