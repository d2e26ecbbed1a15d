"""Layout of buffers, against tables made by hand from the rules."""

import pytest
import torch

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.buffer_building import choose_bucket_size
from megatron.core.distributed.buffer_layout import Alignment, lay_out, sharded_alignment
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer, shard_buffer
from tests.unit_tests.test_public_names import problems_in


def places(layout):
    return list(layout.params), [(b.start, b.end, b.numel_unpadded) for b in layout.buckets]


def test_without_shards_parameters_touch() -> None:
    params, buckets = places(lay_out([10, 100, 7, 30], [False] * 4, None, Alignment()))
    assert params == [(0, 10, 0), (10, 110, 0), (110, 117, 0), (117, 147, 0)]
    assert buckets == [(0, 147, 147)]


def test_a_bucket_closes_once_it_is_full() -> None:
    params, buckets = places(lay_out([60, 40, 99, 1, 250, 5], [False] * 6, 100, Alignment()))
    assert [bucket for _, _, bucket in params] == [0, 0, 1, 1, 2, 3]
    assert buckets == [(0, 100, 100), (100, 200, 100), (200, 450, 250), (450, 455, 5)]


def test_shards_start_at_64_and_buckets_end_at_the_common_multiple() -> None:
    # lcm(6, 128) = 384. Padding inside a bucket counts towards its size: 64 + 40 = 104 >= 100.
    params, buckets = places(lay_out([10, 40, 300, 65, 1], [False] * 5, 100, sharded_alignment(6)))
    assert params == [(0, 10, 0), (64, 104, 0), (384, 684, 1), (768, 833, 2), (896, 897, 2)]
    assert buckets == [(0, 384, 104), (384, 768, 300), (768, 1152, 129)]


def test_a_parameter_may_stand_alone() -> None:
    params, buckets = places(
        lay_out([10, 20, 30, 40], [False, False, True, False], None, sharded_alignment(2))
    )
    assert params == [(0, 10, 0), (64, 84, 0), (128, 158, 1), (256, 296, 2)]
    assert buckets == [(0, 128, 84), (128, 256, 30), (256, 384, 40)]
    _, buckets = places(lay_out([30, 10], [True, False], None, sharded_alignment(2)))
    assert buckets == [(0, 128, 30), (128, 256, 10)]


@pytest.mark.parametrize(
    ("ranks", "high_bandwidth", "multiple"),
    [
        (1, False, 128),
        (2, False, 128),
        (3, False, 384),
        (256, False, 256),
        (3, True, 3 * 2**16),
        (2, True, 2**16),
    ],
)
def test_ends_of_buckets(ranks: int, high_bandwidth: bool, multiple: int) -> None:
    assert sharded_alignment(ranks, high_bandwidth) == Alignment(64, multiple)


def test_totals_are_those_of_a_checkpoint_of_megatron_core() -> None:
    """A LLaMA-like model of 2 layers, hidden 16, on 2 ranks: 6976 elements in its distrib_optim.pt."""
    layer = [16, 16 * 16, 32 * 16, 16, 64 * 16, 16 * 32]
    sizes = [64 * 16, *layer, *layer, 16, 64 * 16]
    layout = lay_out(sizes[::-1], [False] * len(sizes), None, sharded_alignment(2))
    assert (layout.numel_unpadded, layout.numel) == (6976, 7040)


def test_default_size_of_a_bucket() -> None:
    overlap = DistributedDataParallelConfig(overlap_grad_reduce=True)
    assert choose_bucket_size(overlap, False, 8) == 40_000_000
    assert choose_bucket_size(overlap, False, 64) == 64_000_000
    assert choose_bucket_size(overlap, True, 64) is None
    assert choose_bucket_size(DistributedDataParallelConfig(bucket_size=5), False, 8) is None
    chosen = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=5)
    assert choose_bucket_size(chosen, False, 8) == 5


def make_buffer(sharded: bool) -> tuple[list[torch.nn.Parameter], _ParamAndGradBuffer]:
    params = [torch.nn.Parameter(torch.full((size,), float(size))) for size in (5, 70, 3)]
    config = DistributedDataParallelConfig(use_distributed_optimizer=sharded)
    names = {param: str(param.numel()) for param in params}
    buffer = _ParamAndGradBuffer(
        config, torch.float32, torch.float32, params, None, None, names, 1.0, [0, 1, 2]
    )
    return params, buffer


def test_parameters_move_into_the_buffer_only_when_sharded() -> None:
    params, buffer = make_buffer(sharded=False)
    assert buffer.param_data is None
    assert buffer.numel == 78
    params, buffer = make_buffer(sharded=True)
    assert [tuple(buffer.param_index_map[param]) for param in params] == [
        (192, 197, 0),
        (64, 134, 0),
        (0, 3, 0),
    ]
    assert (buffer.numel, buffer.numel_unpadded) == (256, 197)
    buffer.param_data.mul_(2.0)
    buffer.grad_data.fill_(1.0)
    for param in params:
        assert param.eq(2.0 * param.numel()).all()
        assert param.main_grad.eq(1.0).all()
    assert buffer.param_data.eq(0.0).sum() == 256 - 78


def test_shards_are_equal_views() -> None:
    flat = torch.zeros(12)
    shards = shard_buffer(flat, 3)
    shards[1].fill_(1.0)
    assert flat.tolist() == [0.0] * 4 + [1.0] * 4 + [0.0] * 4
    with pytest.raises(AssertionError, match="12 elements do not divide into 5 shards"):
        shard_buffer(flat, 5)


def test_defaults_are_the_original_ones() -> None:
    assert problems_in("megatron.core.distributed") == []
