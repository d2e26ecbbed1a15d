"""Building under torch.distributed: rank 0 first, loading elsewhere, nothing where it is not needed."""

import multiprocessing
import traceback

import pytest
import torch.distributed as dist

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset


def build_on_rank(rank: int, store: str, config, needed_on: tuple[int, ...], results) -> None:
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        datasets = BlendedMegatronDatasetBuilder(
            GPTDataset, [12, 6, 4], lambda: rank in needed_on, config
        ).build()
        facts = [
            None if dataset is None else (dataset.built_anew_on_cache_miss, dataset[0]["tokens"].tolist())
            for dataset in datasets
        ]
        dist.barrier()
        dist.destroy_process_group()
        results.put((rank, facts))
    except BaseException:
        results.put((rank, traceback.format_exc()))


@pytest.mark.parametrize("needed_on", [(0, 1), (0,)])
@pytest.mark.parametrize("form", ["one", "weights", "lengths", "per split"])
def test_two_ranks(in_data, gpt_config, tmp_path, needed_on, form):
    a, b = "u16_text_document", "b_noeod_text_document"
    blend = {
        "one": {"blend": ([a], None), "split": "60,20,20"},
        "weights": {"blend": ([a, b], [0.5, 0.5]), "split": "60,20,20"},
        "lengths": {"blend": ([a, b], None), "split": "60,20,20"},
        "per split": {"blend_per_split": [([a, b], [0.5, 0.5]), ([b], None), None]},
    }[form]
    config = gpt_config(path_to_cache=str(tmp_path / "cache"), num_dataset_builder_threads=2, **blend)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(
            target=build_on_rank, args=(rank, str(tmp_path / "store"), config, needed_on, results)
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    try:
        facts = dict(results.get(timeout=300) for _ in ranks)
        for process in ranks:
            process.join(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    assert isinstance(facts[0], list), facts[0]
    assert isinstance(facts[1], list), facts[1]
    built = [fact for fact in facts[0] if fact is not None]
    assert len(built) == (2 if form == "per split" else 3)
    assert all(anew for anew, _ in built)
    if 1 in needed_on:
        assert facts[1] == [fact and (False, fact[1]) for fact in facts[0]]
    else:
        assert facts[1] == [None, None, None]
