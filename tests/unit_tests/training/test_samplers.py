"""Samplers against the golden figures, and the loader around them."""

import gc
import json
import os
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from megatron.core.errors import ConfigError, DataError
from megatron.legacy.data import data_samplers
from megatron.training import global_vars
from megatron.training.data import samplers
from megatron.training.data.samplers import (
    MegatronPretrainingRandomSampler,
    MegatronPretrainingSampler,
    RandomSeedDataset,
    build_pretraining_data_loader,
)


@pytest.fixture(scope="module")
def runs(golden) -> list[dict]:
    return json.loads((golden / "data" / "samplers.json").read_text())


def cyclic(run: dict, dataset: Dataset | None = None) -> MegatronPretrainingRandomSampler:
    return MegatronPretrainingRandomSampler(
        dataset, run["total"], run["consumed"], run["mbs"], run["rank"], run["dp"], run["data_sharding"]
    )


def test_single_sampler_deals_samples_in_order(runs):
    for run in (run for run in runs if run["kind"] == "single"):
        sampler = MegatronPretrainingSampler(
            run["total"], run["consumed"], run["mbs"], run["rank"], run["dp"], run["drop_last"]
        )
        assert list(sampler) == run["batches"]
        assert len(sampler) == run["total"]
        assert sampler.get_start_end_idx() == (run["rank"] * run["mbs"], (run["rank"] + 1) * run["mbs"])


def test_cyclic_sampler_equals_the_reference_order(runs):
    for run in (run for run in runs if run["kind"] == "cyclic"):
        sampler = cyclic(run)
        assert list(sampler) == run["batches"]
        assert sampler.consumed_samples == run["consumed_after"]
        if "second_pass" in run:
            assert list(sampler) == run["second_pass"]


@pytest.mark.parametrize("total", range(8, 40))
@pytest.mark.parametrize("sharding", [True, False])
def test_all_ranks_take_as_many_steps_and_no_sample_twice(total, sharding):
    batches = [
        list(MegatronPretrainingRandomSampler(None, total, 0, 2, rank, 3, sharding)) for rank in range(3)
    ]
    assert {len(b) for b in batches} == {total // 6}
    seen = [index for rank in batches for batch in rank for index in batch]
    assert len(set(seen)) == len(seen)
    assert max(seen) < total


@pytest.mark.parametrize("sharding", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 3, 5])
def test_cyclic_sampler_resumes_inside_a_pass(sharding, stop):
    """Stopped after some steps and started with the consumed samples: the same batches follow."""
    whole = list(MegatronPretrainingRandomSampler(None, 24, 0, 2, 1, 2, sharding))
    rest = list(MegatronPretrainingRandomSampler(None, 24, stop * 4, 2, 1, 2, sharding))
    assert rest == whole[stop:]


def test_invalid_sampler_arguments_are_refused():
    with pytest.raises(DataError, match="no samples left to consume: 50 of 50"):
        MegatronPretrainingSampler(50, 50, 2, 0, 1)
    with pytest.raises(DataError, match="no samples"):
        MegatronPretrainingSampler(0, 0, 2, 0, 1)
    with pytest.raises(ConfigError, match="must be > 0"):
        MegatronPretrainingSampler(50, 0, 0, 0, 1)
    with pytest.raises(ConfigError, match="rank 2 is not below the size 2"):
        MegatronPretrainingRandomSampler(None, 50, 0, 1, 2, 2, True)
    with pytest.raises(DataError, match="there are 7 samples, fewer than the 8 of one step"):
        MegatronPretrainingRandomSampler(None, 7, 0, 4, 0, 2, True)
    with pytest.raises(ConfigError, match=r"3 consumed .* on a step of 4.*dataloader-type single"):
        next(iter(MegatronPretrainingRandomSampler(None, 50, 3, 2, 0, 2, True)))


def test_legacy_import_path_gives_the_samplers():
    for name in samplers.__all__:
        assert getattr(data_samplers, name) is getattr(samplers, name)


class Numbers(Dataset):
    """Its samples are their numbers."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, idx: int) -> torch.Tensor:
        return torch.tensor(idx)


class Noise(Numbers):
    def __getitem__(self, idx: int) -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())


class Broken(Numbers):
    def __getitem__(self, idx: int) -> torch.Tensor:
        if idx == 5:
            raise DataError("corpus holds token id 7.\nUse another tokenizer.")
        return torch.tensor(idx)


class Deadly(Numbers):
    def __getitem__(self, idx: int) -> torch.Tensor:
        if idx == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.tensor(idx)


@pytest.fixture
def run_arguments(monkeypatch):
    """Stand in for the parsed command line."""

    def set_arguments(**values) -> None:
        defaults = {
            "micro_batch_size": 4,
            "num_workers": 0,
            "dataloader_type": "single",
            "data_sharding": True,
            "seed": 1234,
        }
        arguments = SimpleNamespace(**{**defaults, **values})
        monkeypatch.setattr(global_vars, "get_args", lambda: arguments)

    yield set_arguments
    gc.collect()  # ends the worker processes now, before the next test forks


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_samples_of_its_sampler(run_arguments, workers):
    run_arguments(num_workers=workers)
    loader = build_pretraining_data_loader(Numbers(19), 4)
    expected = [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert [batch.tolist() for batch in loader] == expected
    assert [batch.tolist() for batch in loader] == expected  # persistent workers serve a second pass


def test_cyclic_loader_starts_the_next_pass(run_arguments):
    run_arguments(dataloader_type="cyclic")
    loader = build_pretraining_data_loader(Numbers(9), 4)
    passes = [[batch.tolist() for batch in loader] for _ in range(2)]
    assert passes[0] == [torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()[4:]]
    second = torch.randperm(8, generator=torch.Generator().manual_seed(1)).tolist()
    assert passes[1] == [second[:4], second[4:]]


def test_loader_does_not_change_the_random_state(run_arguments):
    """Dropout draws from the same generator: making an iterator must not move it."""
    run_arguments(num_workers=1)
    before = torch.get_rng_state()
    assert len(list(build_pretraining_data_loader(Numbers(16), 0))) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_empty_data_sets_give_no_loader(run_arguments):
    run_arguments()
    assert build_pretraining_data_loader(None, 0) is None
    assert build_pretraining_data_loader(Numbers(0), 0) is None
    with pytest.raises(DataError, match="3 of 19 samples are left, fewer than the 4"):
        build_pretraining_data_loader(Numbers(19), 16)
    run_arguments(dataloader_type="external")
    own = object()
    assert build_pretraining_data_loader(own, 0) is own
    with pytest.raises(ConfigError, match="not a Numbers of single samples; use --dataloader-type single"):
        build_pretraining_data_loader(Numbers(8), 0)
    run_arguments(dataloader_type="parallel")
    with pytest.raises(ConfigError, match="type single, cyclic or external"):
        build_pretraining_data_loader(Numbers(8), 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_errors_arrive_as_they_were_raised(run_arguments, workers):
    run_arguments(num_workers=workers)
    loader = build_pretraining_data_loader(Broken(16), 0)
    with pytest.raises(DataError) as caught:
        list(loader)
    if workers:  # torch waits five seconds for a worker that has failed
        loader._iterator._workers[0].terminate()
    assert str(caught.value) == "corpus holds token id 7.\nUse another tokenizer."


def test_killed_data_worker_is_reported(run_arguments):
    run_arguments(num_workers=1)
    with pytest.raises(DataError, match=r"a data loading process died.*--num-workers 0"):
        list(build_pretraining_data_loader(Deadly(16), 0))


def test_random_seed_dataset_seeds_every_sample(run_arguments):
    run_arguments(dataloader_type="cyclic")
    dataset = RandomSeedDataset(Noise(16))
    assert len(dataset) == 16
    first = dataset[3]
    assert dataset[4] != first
    assert dataset[3] == first
    torch.manual_seed(1234 + 3)
    assert first[0] == torch.rand(()).item()
    dataset.set_epoch(1)
    assert dataset[2] == first  # base seed + epoch + index
    run = {"total": 16, "consumed": 16, "mbs": 4, "rank": 0, "dp": 1, "data_sharding": True}
    list(cyclic(run, RandomSeedDataset(Noise(16))))
    dataset.set_epoch(0)
    sampler_told = RandomSeedDataset(Noise(16))
    list(cyclic(run, sampler_told))
    assert sampler_told.curr_seed == 1234 + 1
