"""What code with layers of its own uses: marks of split parameters, their first values, and gathered rows."""

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.errors import UsageError
from megatron.core.tensor_parallel import initial_weights
from megatron.core.tensor_parallel.initial_weights import (
    _initialize_affine_weight_cpu,
    _initialize_affine_weight_gpu,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.rng_tracker import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
    model_parallel_cuda_manual_seed,
)
from tests.distributed.pool import run_ranks


def marks(tensor):
    names = ("tensor_model_parallel", "partition_dim", "partition_stride")
    return tuple(getattr(tensor, name, None) for name in names)


def test_marks_of_parameters():
    split, whole, copied = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    initial_weights.set_tensor_model_parallel_attributes(split, True, 1, 2)
    assert marks(split) == (True, 1, 2)
    with pytest.raises(UsageError, match="tensor_model_parallel = True already"):
        initial_weights.set_tensor_model_parallel_attributes(split, True, 0, 1)
    for parameter in (split, whole):
        initial_weights.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    assert marks(split) == (True, 1, 2) and marks(whole) == (False, -1, 1)
    initial_weights.copy_tensor_model_parallel_attributes(copied, torch.zeros(1))
    assert marks(copied) == (None, None, None)
    initial_weights.copy_tensor_model_parallel_attributes(copied, split)
    assert marks(copied) == (True, 1, 2)


@pytest.mark.parametrize(("rank", "counted"), [(0, (True, True)), (1, (True, False))])
def test_each_element_is_counted_once(rank, counted, monkeypatch):
    monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda: rank)
    split, whole = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    split.tensor_model_parallel = True
    found = tuple(initial_weights.param_is_not_tensor_parallel_duplicate(p) for p in (split, whole))
    assert found == counted


@pytest.mark.parametrize(("dim", "stride"), [(0, 1), (1, 1), (0, 2)])
def test_parts_of_a_weight_drawn_as_a_whole(dim, stride):
    parts = []
    for rank in range(2):
        torch.manual_seed(5)
        weight = torch.nn.Parameter(torch.zeros(8, 6).chunk(2, dim)[0].clone())
        whole = _initialize_affine_weight_cpu(
            weight, 8, 6, weight.shape[dim], dim, torch.nn.init.normal_, stride, True, rank=rank, world_size=2
        )
        assert marks(weight) == (True, dim, stride)
        parts.append(weight.detach())
    pieces = whole.chunk(2 * stride, dim)
    for rank in range(2):
        assert torch.equal(parts[rank], torch.cat(pieces[rank::2], dim))
    alone = torch.nn.Parameter(torch.zeros(8, 6))
    torch.manual_seed(5)
    assert _initialize_affine_weight_cpu(alone, 8, 6, 8, 0, torch.nn.init.normal_) is None
    assert torch.equal(alone, whole)


@pytest.mark.parametrize("is_expert", [False, True])
def test_a_weight_drawn_from_a_stream_moves_only_that_stream(is_expert):
    model_parallel_cuda_manual_seed(3)
    before = get_cuda_rng_tracker().get_states()
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    _initialize_affine_weight_gpu(weight, torch.nn.init.normal_, 1, 2, is_expert)
    moved = {n for n, s in get_cuda_rng_tracker().get_states().items() if not torch.equal(s, before[n])}
    assert moved == {get_expert_parallel_rng_tracker_name() if is_expert else "model-parallel-rng"}
    assert marks(weight) == (True, 1, 2) and bool(weight.abs().sum() > 0)


def gathered_twice():
    parallel_state.initialize_model_parallel(2)
    first = gather_from_sequence_parallel_region(torch.full((1, 2), float(dist.get_rank())))
    second = gather_from_sequence_parallel_region(torch.full((1, 2), 7.0))
    return first, second


def test_gathered_rows_are_memory_of_their_own():
    for first, second in run_ranks(2, gathered_twice):
        assert first.tolist() == [[0.0, 0.0], [1.0, 1.0]] and second.tolist() == [[7.0, 7.0]] * 2
