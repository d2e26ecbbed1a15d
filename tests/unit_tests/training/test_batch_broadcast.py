"""What each pipeline stage and tensor-parallel rank gets of a micro-batch, and who reads it."""

import argparse
from unittest import mock

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.errors import DataError
from megatron.core.models.gpt.family import GPT
from megatron.training.data import batch
from tests.distributed.pool import run_ranks

B, S = 2, 8


def sample(mask: bool = False) -> dict[str, torch.Tensor]:
    """Every entry different in every place."""
    numbers = torch.arange(B * S).view(B, S)
    entries = {
        "tokens": numbers,
        "labels": numbers + 1000,
        "loss_mask": (numbers / 7).float(),
        "position_ids": numbers + 2_000_000_000_000,
    }
    if mask:
        entries["attention_mask"] = (torch.arange(B * S * S) % 3 == 0).view(B, 1, S, S)
    return entries


class Reader:
    """An iterator that counts how often it is asked."""

    def __init__(self, *samples: dict[str, torch.Tensor]):
        self.samples, self.asked = list(samples), 0

    def __next__(self) -> dict[str, torch.Tensor]:
        self.asked += 1
        return self.samples.pop(0)


def read(tp: int, pp: int, vpp: int | None = None, mask: bool = False, given: dict | None = None):
    """Per chunk: the batch as lists and how often its iterator was asked; on the chunks that may read."""
    parallel_state.initialize_model_parallel(tp, pp, vpp)
    args = argparse.Namespace(
        micro_batch_size=B,
        seq_length=S,
        reset_attention_mask=mask,
        create_attention_mask_in_dataloader=True,
    )
    seen = []
    with mock.patch.object(batch, "get_args", lambda: args):
        for chunk in range(vpp or 1):
            if vpp:
                parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
            reader = None
            if batch.stage_needs_data(args) and parallel_state.get_tensor_model_parallel_rank() == 0:
                reader = Reader(given or sample(mask))
            found = batch.get_batch_on_this_tp_rank(reader)
            assert tuple(found) == tuple(GPT.batch)
            values = {key: value for key, value in found.items() if value is not None}
            seen.append((values, reader.asked if reader else 0))
    return seen


def assert_holds(values: dict[str, torch.Tensor], *keys: str, mask: bool = False) -> None:
    """The batch holds exactly these entries of the sample, of the same types."""
    assert sorted(values) == sorted(keys)
    for key in keys:
        torch.testing.assert_close(values[key], sample(mask)[key], rtol=0, atol=0)


ALL = ("tokens", "labels", "loss_mask", "position_ids")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_first_tensor_parallel_rank_reads_and_all_get_equal_batches(world):
    for rank, [(values, asked)] in enumerate(run_ranks(world, read, world, 1)):
        assert_holds(values, *ALL)
        assert asked == (1 if rank == 0 else 0)


def test_first_and_last_stage_get_only_the_tensors_they_use():
    # ranks 0, 1 are the first stage, 2, 3 the second
    results = run_ranks(4, read, 2, 2)
    for rank, [(values, asked)] in enumerate(results):
        assert_holds(values, *(("tokens", "position_ids") if rank < 2 else ("labels", "loss_mask")))
        assert asked == (1 if rank in (0, 2) else 0)


def test_stages_in_the_middle_get_nothing():
    first, second, third, last = (chunks[0] for chunks in run_ranks(4, read, 1, 4))
    assert_holds(first[0], "tokens", "position_ids")
    assert_holds(last[0], "labels", "loss_mask")
    assert second == ({}, 0)
    assert third == ({}, 0)


def test_every_stage_gets_the_mask_between_documents():
    for rank, [(values, asked)] in enumerate(run_ranks(4, read, 2, 2, mask=True)):
        keys = ("tokens", "position_ids") if rank < 2 else ("labels", "loss_mask")
        assert_holds(values, *keys, "attention_mask", mask=True)
        assert asked == (1 if rank in (0, 2) else 0)


def test_virtual_stages_read_in_the_first_and_in_the_last_chunk():
    first, last = run_ranks(2, read, 1, 2, 2)
    assert_holds(first[0][0], "tokens", "position_ids")
    assert first[1] == ({}, 0)
    assert last[0] == ({}, 0)
    assert_holds(last[1][0], "labels", "loss_mask")


def complaint(given: dict[str, torch.Tensor]) -> str:
    """What rank 0 says about a sample, before anything travels."""
    parallel_state.initialize_model_parallel(2)
    args = argparse.Namespace(
        micro_batch_size=B, seq_length=S, reset_attention_mask=False, create_attention_mask_in_dataloader=True
    )
    if parallel_state.get_tensor_model_parallel_rank() > 0:
        return ""
    with mock.patch.object(batch, "get_args", lambda: args), pytest.raises(DataError) as caught:
        batch.get_batch_on_this_tp_rank(Reader(given))
    return str(caught.value)


def read_beyond_the_end() -> str:
    parallel_state.initialize_model_parallel(1)
    args = argparse.Namespace(
        micro_batch_size=B, seq_length=S, reset_attention_mask=False, create_attention_mask_in_dataloader=True
    )
    with mock.patch.object(batch, "get_args", lambda: args), pytest.raises(DataError) as error:
        batch.get_batch_on_this_tp_rank(iter([]))
    return str(error.value)


def test_data_that_ends_too_early_is_an_error():
    (message,) = run_ranks(1, read_beyond_the_end)
    assert message.startswith("the data set is used up before the run is")


def test_a_sample_of_another_length_is_an_error():
    longer = sample() | {"labels": torch.zeros(B, S + 1, dtype=torch.int64)}
    message = run_ranks(2, complaint, longer)[0]
    assert "'labels'" in message and "[2, 9]" in message and "[2, 8]" in message


def test_a_sample_without_a_tensor_is_an_error():
    entries = sample()
    del entries["loss_mask"]
    assert "'loss_mask'" in run_ranks(2, complaint, entries)[0]


def test_a_mask_that_no_flag_announces_is_an_error():
    assert "--reset-attention-mask" in run_ranks(2, complaint, sample(mask=True))[0]


def test_a_plain_causal_mask_is_not_broadcast():
    causal = torch.ones(S, S, dtype=torch.bool).triu(1).expand(B, 1, S, S)
    for [(values, _)] in run_ranks(2, read, 2, 1, given=sample() | {"attention_mask": causal}):
        assert_holds(values, *ALL)
