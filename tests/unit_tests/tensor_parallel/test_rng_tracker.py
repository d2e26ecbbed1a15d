"""Named random streams and recomputation."""

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.errors import MegatronError
from megatron.core.tensor_parallel import random as streams
from megatron.core.tensor_parallel.random import (
    CheckpointWithoutOutput,
    CudaRNGStatesTracker,
    RngStreamError,
    checkpoint,
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from megatron.core.tensor_parallel.replica_streams import replica_streams
from tests.distributed.pool import run_ranks


def draws(seed, count=4):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def test_seeds_of_the_streams():
    model_parallel_cuda_manual_seed(1000)
    tracker = get_cuda_rng_tracker()
    assert tracker.is_initialized()
    assert torch.equal(torch.rand(4), draws(1000))
    for name, seed in (
        ("model-parallel-rng", 3718),
        ("expert-parallel-rng", 2024),
        ("data-parallel-rng", 1000),
    ):
        with tracker.fork(name):
            assert torch.equal(torch.rand(4), draws(seed)), name


def test_fork_goes_on_where_it_left_off_and_leaves_the_default_alone():
    model_parallel_cuda_manual_seed(7)
    tracker = get_cuda_rng_tracker()
    expected, default = draws(7 + 2718, 8), draws(7, 6)
    pieces = [torch.rand(3)]
    with tracker.fork():
        first = torch.rand(4)
    pieces.append(torch.rand(3))
    with pytest.raises(ZeroDivisionError), tracker.fork():
        second = torch.rand(4)
        raise ZeroDivisionError
    assert torch.equal(torch.cat((first, second)), expected)
    assert torch.equal(torch.cat(pieces), default)


def test_names_and_seeds_are_unique():
    tracker = CudaRNGStatesTracker()
    assert not tracker.is_initialized()
    before = torch.get_rng_state()
    tracker.add("one", 1)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RngStreamError, match="seed 1"):
        tracker.add("two", 1)
    with pytest.raises(RngStreamError, match="exists already"):
        tracker.add("one", 2)
    with pytest.raises(RngStreamError, match=r"'three' does not exist.*one"), tracker.fork("three"):
        pass
    tracker.reset()
    assert tracker.get_states() == {}
    tracker.add("one", 1)


def test_states_can_be_saved_and_restored():
    model_parallel_cuda_manual_seed(3)
    tracker = get_cuda_rng_tracker()
    saved = tracker.get_states()
    with tracker.fork():
        first = torch.rand(5)
    tracker.set_states(saved)
    with tracker.fork():
        assert torch.equal(torch.rand(5), first)
    assert streams.get_all_rng_states().keys() == saved.keys()


def test_inference_tracker_draws_from_the_default():
    tracker = CudaRNGStatesTracker(is_inference_rng_tracker=True)
    tracker.add("any", 1)
    torch.manual_seed(5)
    with tracker.fork("unknown"):
        assert torch.equal(torch.rand(4), draws(5))


def noisy(x, y):
    """Draws from the CPU's default stream and from a named one."""
    with get_cuda_rng_tracker().fork():
        mask = torch.rand_like(x)
    return (x * torch.rand_like(x)).tanh() * mask + y.exp(), x - y


def run(function):
    model_parallel_cuda_manual_seed(11)
    x, y = (torch.arange(6.0).sub(offset).div(4).requires_grad_() for offset in (2, 3))
    first, second = function(x, y)
    after = torch.rand(3)
    (first.square().sum() + (second * 3).sum()).backward()
    return first.detach(), second.detach(), x.grad, y.grad, after, torch.get_rng_state()


def test_checkpoint_replays_all_streams():
    for found, expected in zip(run(lambda x, y: checkpoint(noisy, False, x, y)), run(noisy), strict=True):
        assert torch.equal(found, expected)


def test_checkpoint_passes_other_arguments_and_unused_outputs():
    x = torch.ones(3, requires_grad=True)

    def function(a, factor, nothing, b):
        assert nothing is None
        return a * factor, b * 2

    out, _ = checkpoint(function, False, x, 5, None, torch.ones(2))
    out.sum().backward()
    assert x.grad.tolist() == [5, 5, 5]


def test_checkpoint_keeps_only_the_inputs():
    weight = torch.randn(64, 64, requires_grad=True)
    x = torch.randn(8, 64, requires_grad=True)
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = checkpoint(lambda x: (x @ weight).tanh() @ weight, False, x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    out.sum().backward()
    assert weight.grad is not None


def test_checkpoint_refuses_what_it_cannot_do():
    x = torch.ones(3, requires_grad=True)
    out = checkpoint(torch.exp, False, x)
    with pytest.raises(MegatronError, match="backward"):
        torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize("discard", [True, False])
def test_checkpoint_without_output(discard):
    weight = torch.randn(6, 6, requires_grad=True)

    def forward(x, y):
        recompute = CheckpointWithoutOutput()
        normed, other = recompute.checkpoint(noisy, x, y)
        out = normed @ weight + other.square()
        if discard:
            recompute.discard_output_and_register_recompute(out)
            assert normed.untyped_storage().nbytes() == 0
        return out, x - y

    def plain(x, y):
        normed, other = noisy(x, y)
        return normed @ weight + other.square(), x - y

    found = run(forward)
    found_weight, weight.grad = weight.grad, None
    expected = run(plain)
    # Not the same bits: gradients of x are summed in another order.
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    torch.testing.assert_close(found_weight, weight.grad)


def test_nothing_is_freed_without_a_backward_to_come():
    recompute = CheckpointWithoutOutput()
    with torch.no_grad():
        out = recompute.checkpoint(torch.exp, torch.ones(3))
        recompute.discard_output_and_register_recompute(out * 2)
    assert torch.equal(out, torch.ones(3).exp())


def draws_inside_and_after():
    """What each rank draws inside, and the streams afterwards."""
    parallel_state.initialize_model_parallel(2)
    model_parallel_cuda_manual_seed(5)
    torch.manual_seed(7)
    before = get_cuda_rng_tracker().get_states()
    with replica_streams():
        with get_cuda_rng_tracker().fork():
            inside = (float(torch.rand(1)), float(torch.rand(1)))
        plain = float(torch.rand(1))
    with get_cuda_rng_tracker().fork():
        after = float(torch.rand(1))
    states = get_cuda_rng_tracker().get_states()
    moved = not torch.equal(before["model-parallel-rng"], states["model-parallel-rng"])
    return inside, plain, after, float(torch.rand(1)), moved


def test_replicas_draw_apart_and_go_on_together():
    """4 ranks: tensor-parallel pairs, two replicas."""
    inside, plain, after, plain_after, moved = zip(*run_ranks(4, draws_inside_and_after), strict=True)
    assert len(set(inside)) == 4 and all(moved)
    assert plain[0] == plain[1] != plain[2] == plain[3]
    # Afterwards replicas draw the same again, and tensor-parallel ranks from streams of their own.
    assert after[0] == after[2] != after[1] == after[3] and len(set(plain_after)) == 1


def draws_of_one_replica():
    parallel_state.initialize_model_parallel(2)
    torch.manual_seed(7)
    with replica_streams():
        inside = float(torch.rand(1))
    torch.manual_seed(7)
    return inside == float(torch.rand(1))


def test_one_replica_draws_as_if_nothing_were_there():
    assert run_ranks(2, draws_of_one_replica) == [True, True]
    torch.manual_seed(7)
    with replica_streams():  # nor without process groups
        inside = float(torch.rand(1))
    torch.manual_seed(7)
    assert inside == float(torch.rand(1))
