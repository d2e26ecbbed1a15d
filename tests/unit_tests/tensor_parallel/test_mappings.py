"""Every mapping and its backward, against the same done by hand with all ranks' tensors at hand."""

import pytest
import torch
import torch.distributed as dist

from megatron.core import collectives, parallel_state
from megatron.core.tensor_parallel import mappings
from tests.distributed.pool import run_ranks

SHAPE = (8, 3, 16)


def numbers(rank, kind, shape):
    """What ``rank`` holds: any other rank can make it as well."""
    generator = torch.Generator().manual_seed(100 * rank + len(kind))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def part(whole, dim, rank, ranks):
    return whole.chunk(ranks, dim)[rank]


def joined(held, dim):
    return torch.cat(held, dim)


# name -> (forward, backward), both from the list of what all ranks hold and a rank to what that rank gets
BY_HAND = {
    "copy_to_tensor_model_parallel_region": (lambda held, r: held[r], lambda held, r: sum(held)),
    "reduce_from_tensor_model_parallel_region": (lambda held, r: sum(held), lambda held, r: held[r]),
    "scatter_to_tensor_model_parallel_region": (
        lambda held, r: part(held[r], -1, r, len(held)),
        lambda held, r: joined(held, -1),
    ),
    "gather_from_tensor_model_parallel_region": (
        lambda held, r: joined(held, -1),
        lambda held, r: part(held[r], -1, r, len(held)),
    ),
    "scatter_to_sequence_parallel_region": (
        lambda held, r: part(held[r], 0, r, len(held)),
        lambda held, r: joined(held, 0),
    ),
    "gather_from_sequence_parallel_region": (
        lambda held, r: joined(held, 0),
        lambda held, r: part(sum(held), 0, r, len(held)),
    ),
    "reduce_scatter_to_sequence_parallel_region": (
        lambda held, r: part(sum(held), 0, r, len(held)),
        lambda held, r: joined(held, 0),
    ),
    "all_gather_last_dim_from_tensor_parallel_region": (
        lambda held, r: joined(held, -1),
        lambda held, r: part(sum(held), -1, r, len(held)),
    ),
    "reduce_scatter_last_dim_to_tensor_parallel_region": (
        lambda held, r: part(sum(held), -1, r, len(held)),
        lambda held, r: joined(held, -1),
    ),
}


def check_all():
    rank, ranks = dist.get_rank(), dist.get_world_size()
    parallel_state.initialize_model_parallel(ranks)
    for name, (forward, backward) in BY_HAND.items():
        for options in ({}, {"group": parallel_state.get_tensor_model_parallel_group()}):
            x = numbers(rank, "input", SHAPE).requires_grad_()
            out = getattr(mappings, name)(x, **options)
            torch.testing.assert_close(out, forward([numbers(r, "input", SHAPE) for r in range(ranks)], rank))
            out.backward(numbers(rank, "gradient", out.shape))
            gradients = [numbers(r, "gradient", out.shape) for r in range(ranks)]
            torch.testing.assert_close(x.grad, backward(gradients, rank), msg=lambda m, n=name: f"{n}: {m}")
    check_plain_split_gradient(rank, ranks)
    check_uneven(rank, ranks)
    check_exchange(rank, ranks)
    check_tokens_for_channels(rank, ranks)
    check_scratch_memory(rank, ranks)
    check_called_as_classes(rank, ranks)


def check_plain_split_gradient(rank, ranks):
    x = numbers(rank, "input", SHAPE).requires_grad_()
    out = mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
    gradient = numbers(0, "gradient", out.shape)  # the same on all ranks
    out.backward(gradient)
    torch.testing.assert_close(x.grad, part(gradient, 0, rank, ranks))


def check_uneven(rank, ranks):
    sizes = [2 * r + 1 for r in range(ranks)]
    held = [numbers(r, "input", (size, 3)) for r, size in enumerate(sizes)]
    x = held[rank].clone().requires_grad_()
    out = mappings.gather_from_sequence_parallel_region(x, output_split_sizes=sizes)
    torch.testing.assert_close(out, joined(held, 0))
    out.backward(numbers(rank, "gradient", out.shape))
    total = sum(numbers(r, "gradient", out.shape) for r in range(ranks))
    torch.testing.assert_close(x.grad, total.split(sizes)[rank])
    y = numbers(rank, "whole", (sum(sizes), 3)).requires_grad_()
    out = mappings.reduce_scatter_to_sequence_parallel_region(y, input_split_sizes=sizes)
    total = sum(numbers(r, "whole", y.shape) for r in range(ranks))
    torch.testing.assert_close(out, total.split(sizes)[rank])
    out.backward(held[rank])
    torch.testing.assert_close(y.grad, joined(held, 0))


def check_exchange(rank, ranks):
    """Rank r sends r + 2 q + 1 rows to rank q."""
    sends = [[r + 2 * q + 1 for q in range(ranks)] for r in range(ranks)]
    held = [numbers(r, "input", (sum(sends[r]), 2)) for r in range(ranks)]
    x = held[rank].clone().requires_grad_()
    receives = [sends[r][rank] for r in range(ranks)]
    group = parallel_state.get_tensor_model_parallel_group()
    out = mappings.all_to_all(group, x, receives, sends[rank])
    torch.testing.assert_close(out, joined([held[r].split(sends[r])[rank] for r in range(ranks)], 0))
    (2 * out).sum().backward()
    assert bool((x.grad == 2).all())


def check_tokens_for_channels(rank, ranks):
    held = [numbers(r, "input", (6, 8)) for r in range(ranks)]
    x = held[rank].clone().requires_grad_()
    out = mappings.all_to_all_sp2hp(x)
    torch.testing.assert_close(out, part(joined(held, 0), 1, rank, ranks))
    back = mappings.all_to_all_hp2sp(out)
    torch.testing.assert_close(back, x)
    gradient = numbers(rank, "gradient", back.shape)
    back.backward(gradient)
    torch.testing.assert_close(x.grad, gradient)


def check_scratch_memory(rank, ranks):
    """Results in the global buffer share memory; others do not."""
    x = numbers(rank, "input", SHAPE)
    for function in (
        mappings.gather_from_sequence_parallel_region,
        mappings.reduce_scatter_to_sequence_parallel_region,
    ):
        fresh, again = function(x), function(x)
        assert fresh.data_ptr() != again.data_ptr()
        buffered = function(x, use_global_buffer=True)
        torch.testing.assert_close(buffered, fresh)
        assert buffered.data_ptr() == function(2 * x, use_global_buffer=True).data_ptr()


def check_called_as_classes(rank, ranks):
    """The nodes are also called one step at a time, without a context."""
    x = numbers(rank, "input", SHAPE)
    total = sum(numbers(r, "input", SHAPE) for r in range(ranks))
    assert torch.equal(mappings._CopyToModelParallelRegion.symbolic(None, x), x)
    torch.testing.assert_close(mappings._CopyToModelParallelRegion.backward(None, x), total)
    torch.testing.assert_close(mappings._ReduceFromModelParallelRegion.symbolic(None, x), total)
    grad, *rest = mappings._GatherFromSequenceParallelRegion.backward(None, x)
    torch.testing.assert_close(grad, part(total, 0, rank, ranks))
    assert rest == [None] * 4


@pytest.mark.parametrize("ranks", [2, 4])
def test_against_the_same_by_hand(ranks):
    run_ranks(ranks, check_all)


def reduce_every_dtype():
    group, rank = dist.group.WORLD, dist.get_rank()
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        whole = torch.arange(4, dtype=dtype) + rank
        mine, all_ = whole.new_empty(2), whole.new_empty(4)
        collectives.reduce_scatter(mine, whole, group)
        work = collectives.all_gather(all_, mine, group, async_op=True)
        work.wait()
        found.append((all_.dtype == dtype, all_.tolist()))
    return found


def test_collectives_of_every_dtype():
    for found in run_ranks(2, reduce_every_dtype):
        assert found == [(True, [1.0, 3.0, 5.0, 7.0])] * 4
