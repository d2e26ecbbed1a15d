"""Batches that one rank read, on all its tensor-parallel partners."""

import torch

from megatron.core import parallel_state
from megatron.core.errors import DataError
from megatron.core.tensor_parallel import broadcast_data
from tests.distributed.pool import run_ranks


def batch(number):
    return {
        "tokens": torch.arange(12).view(3, 4) + 100 * number,
        "scalar": torch.tensor(7 + number),
        "five": torch.full((1, 2, 1, 2, 1), number),
        "unused": torch.zeros(2),
    }


def receive():
    """Two groups of two ranks, each with a batch of its own."""
    parallel_state.initialize_model_parallel(2)
    rank = torch.distributed.get_rank()
    data = batch(rank // 2) if parallel_state.get_tensor_model_parallel_rank() == 0 else None
    keys = ["five", "scalar", "tokens"]
    found = broadcast_data(keys, data, torch.int64)
    empty = broadcast_data([], data, torch.int64)
    return {key: tensor.tolist() for key, tensor in found.items()}, empty


def test_every_rank_gets_its_groups_batch():
    for rank, (found, empty) in enumerate(run_ranks(4, receive)):
        assert found == {key: batch(rank // 2)[key].tolist() for key in ("five", "scalar", "tokens")}
        assert empty == {}


def receive_bad():
    parallel_state.initialize_model_parallel(2)
    is_reader = parallel_state.get_tensor_model_parallel_rank() == 0
    try:
        broadcast_data(["tokens", "labels"], batch(0) if is_reader else None, torch.int64)
    except DataError as error:
        return str(error)
    return "accepted"


def test_a_bad_batch_fails_on_all_ranks():
    reader, partner = run_ranks(2, receive_bad)
    assert reader.startswith("batch has no 'labels'")
    assert partner.startswith("rank 0, which reads this rank's batches, has no valid one")
