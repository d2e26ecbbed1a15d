"""The public transfer functions, in a schedule written by hand, on two and four stages."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from toy_stages import make_config

from megatron.core import accelerator, parallel_state
from megatron.core.errors import UsageError
from megatron.core.pipeline_parallel import p2p_communication as p2p
from megatron.core.pipeline_parallel import schedules
from tests.distributed.pool import run_ranks
from tests.unit_tests.test_public_names import problems_in

SHAPE = (3, 2, 6)


def begin(**changes):
    parallel_state.initialize_model_parallel(1, dist.get_world_size(), create_gloo_process_groups=False)
    config = make_config(pipeline_model_parallel_size=dist.get_world_size(), **changes)
    return config, parallel_state.get_pipeline_model_parallel_rank(), dist.get_world_size()


def value(number, shape=SHAPE):
    return torch.full(shape, float(number), dtype=torch.float64)


def read(tensor):
    return None if tensor is None else float(tensor.flatten()[0])


def chain(**changes):
    """Activations down the line and gradients back up, each rank adding 1."""
    config, _, _ = begin(**changes)
    got = p2p.recv_forward(SHAPE, config)
    p2p.send_forward(value(10) if got is None else got.detach() + 1, config)
    back = p2p.recv_backward(SHAPE, config)
    p2p.send_backward(value(50) if back is None else back.detach() + 1, config)
    return read(got), read(back), None if got is None else got.requires_grad


WAYS = [{}, {"batch_p2p_comm": False}, {"variable_seq_lengths": True}]


@pytest.mark.parametrize("changes", WAYS)
def test_down_the_line_and_back(changes):
    assert run_ranks(4, chain, **changes) == [
        (None, 52.0, None),
        (10.0, 51.0, True),
        (11.0, 50.0, True),
        (12.0, None, True),
    ]


def pairs(**changes):
    """Both directions at once between neighbours, in the shape lists of ``schedules``."""
    config, rank, world = begin(**changes)
    result = []
    for low in range(world - 1):
        if rank == low:
            got = schedules.send_forward_recv_backward([value(100 + low)], [SHAPE], config)
        elif rank == low + 1:
            got = schedules.send_backward_recv_forward([value(200 + low)], [SHAPE], config)
        else:
            continue
        result.append(read(got[0]))
    # The outer ends have no neighbour to talk to.
    if rank == 0:
        assert schedules.send_backward_recv_forward([value(0)], [SHAPE], config) == [None]
    if rank == world - 1:
        assert schedules.send_forward_recv_backward([value(0)], [SHAPE], config) == [None]
    return result


@pytest.mark.parametrize("changes", WAYS)
def test_both_directions_at_once(changes):
    assert run_ranks(2, pairs, **changes) == [[200.0], [100.0]]
    assert run_ranks(4, pairs, **changes) == [[200.0], [100.0, 201.0], [101.0, 202.0], [102.0]]


def ring(overlap, **changes):
    """Everybody sends and receives at once, around the ring, as in the steady state of interleaving."""
    config, rank, _ = begin(**changes)
    forward = p2p.send_forward_recv_forward(value(rank), True, SHAPE, config, overlap)
    backward = p2p.send_backward_recv_backward(value(10 + rank), True, SHAPE, config, overlap)
    if overlap:
        for _, handles in (forward, backward):
            for handle in handles:
                handle.wait()
        forward, backward = forward[0], backward[0]
    both = p2p.send_forward_backward_recv_forward_backward(
        value(20 + rank), value(30 + rank), True, True, SHAPE, config
    )
    return [read(tensor) for tensor in (forward, backward, *both)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("batched", [True, False])
def test_around_the_ring(world, overlap, batched):
    for rank, found in enumerate(run_ranks(world, ring, overlap, batch_p2p_comm=batched)):
        before, after = (rank - 1) % world, (rank + 1) % world
        assert found == [before, 10 + after, 20 + before, 30 + after]


def nothing_to_send():
    """Only the ends that have something take part."""
    config, rank, _ = begin()
    if rank == 0:
        return read(p2p.send_forward_recv_forward(value(7), False, SHAPE, config))
    return read(p2p.send_forward_recv_forward(None, True, SHAPE, config))


def test_only_ranks_with_something_to_send_take_part():
    assert run_ranks(2, nothing_to_send) == [None, 7.0]


def lengths_differ():
    config, rank, _ = begin(variable_seq_lengths=True)
    if rank == 0:
        p2p.send_forward(value(1, (9, 1, 2)), config)
        return tuple(p2p.recv_backward(SHAPE, config).shape)
    got = p2p.recv_forward(SHAPE, config)
    p2p.send_backward(value(1, (4, 5, 6)), config)
    return tuple(got.shape)


def test_variable_shapes_are_announced():
    assert run_ranks(2, lengths_differ) == [(4, 5, 6), (9, 1, 2)]


def many_dimensions():
    config, rank, _ = begin(variable_seq_lengths=True)
    shape = (1, 2, 1, 2, 1, 2, 3)
    if rank == 0:
        return p2p.send_forward(value(1, shape), config)
    return tuple(p2p.recv_forward(SHAPE, config).shape)


def test_shapes_of_seven_dimensions_are_announced():
    assert run_ranks(2, many_dimensions)[1] == (1, 2, 1, 2, 1, 2, 3)


def no_shape():
    config, rank, _ = begin()
    with pytest.raises(UsageError, match="needs a tensor_shape"):
        (p2p.recv_backward if rank == 0 else p2p.recv_forward)(None, config)


def test_receiving_without_a_shape_is_refused():
    run_ranks(2, no_shape)


def synchronisations(batched, asked):
    """How often the device is waited for after one message."""
    config, rank, _ = begin(batch_p2p_comm=batched, batch_p2p_sync=asked)
    with mock.patch.object(accelerator, "synchronize") as synchronize:
        if rank == 0:
            p2p.send_forward(value(1), config)
        else:
            p2p.recv_forward(SHAPE, config)
    return synchronize.call_count


def test_only_batched_receiving_synchronises_and_only_where_asked():
    assert run_ranks(2, synchronisations, True, True) == [0, 1]
    for other in ((True, False), (False, True), (False, False)):
        assert run_ranks(2, synchronisations, *other) == [0, 0]


def half_precision():
    config, rank, _ = begin(pipeline_dtype=torch.bfloat16)
    if rank == 0:
        p2p.send_forward(value(3).bfloat16(), config)
        return None
    return p2p.recv_forward(SHAPE, config).dtype


def fp32_residual():
    config, rank, _ = begin(pipeline_dtype=torch.bfloat16, fp32_residual_connection=True)
    if rank == 0:
        p2p.send_forward(value(3).float(), config)
        return None
    return p2p.recv_forward(SHAPE, config).dtype


def test_tensors_travel_in_the_type_of_the_residual_stream():
    assert run_ranks(2, half_precision)[1] == torch.bfloat16
    assert run_ranks(2, fp32_residual)[1] == torch.float32


def test_defaults_are_the_original_ones() -> None:
    assert problems_in("megatron.core.pipeline_parallel") == []
