"""Blends: golden figures, forms of blends, cache, and what cannot be blended."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
from megatron.core.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
BLENDS = ["w3", "w3_unnorm", "noweights_sized", "noweights_none", "w1", "per_split"]


@pytest.fixture
def golden_blend(in_data, gpt_config):
    def load(name: str, **settings) -> tuple:
        case = json.loads(Path("blend_settings.json").read_text())[name]
        per_split = case["per_split"] and [blend and tuple(blend) for blend in case["per_split"]]
        config = gpt_config(
            random_seed=case["seed"],
            sequence_length=case["seq_length"],
            blend=case["blend"] and tuple(case["blend"]),
            blend_per_split=per_split,
            split=case["split"],
            **settings,
        )
        return config, case["sizes"], json.loads(Path(f"blend_{name}/info.json").read_text())

    return load


def check_blend(dataset: BlendedDataset, fact: dict) -> None:
    assert dataset.weights == fact["weights"]
    assert dataset.size == fact["size"]
    for member, known in zip(dataset.datasets, fact["members"], strict=True):
        assert member.dataset_path == known["path"]
        assert member.num_samples == known["num_samples"]
        assert len(member) == known["len"]
        assert member.unique_description_hash == known["hash"]
    if fact["description"] is not None:
        assert dataset.unique_description == fact["description"]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("name", BLENDS)
def test_blend_equals_golden_files(golden_blend, build_gpt, tmp_path, name, threads):
    config, sizes, facts = golden_blend(
        name, path_to_cache=str(tmp_path), num_dataset_builder_threads=threads
    )
    for split, dataset in zip(SPLITS, build_gpt(config, sizes), strict=True):
        fact = facts[split]
        if fact is None:
            assert dataset is None
            continue
        assert type(dataset).__name__ == fact["type"]
        assert len(dataset) == fact["len"]
        assert dataset.unique_description_hash == fact["hash"]
        if fact["type"] != "BlendedDataset":
            continue
        check_blend(dataset, fact)
        for index in ("dataset_index", "dataset_sample_index"):
            expected = np.load(f"blend_{name}/{split}_{index}.npy")
            assert getattr(dataset, index).dtype == expected.dtype
            assert np.array_equal(getattr(dataset, index), expected)
        for i, expected in enumerate(np.load(f"blend_{name}/{split}_first_tokens.npy").tolist()):
            sample = dataset[i]
            assert next(iter(sample)) == "dataset_id"
            assert sample["dataset_id"] == dataset.dataset_index[i]
            assert sample["dataset_id"].dtype == np.int16
            assert sample["tokens"].tolist() == expected
    # The figures record the directory after some arrays were saved beside the cache files.
    recorded = {file for file in facts["cache_files"] if len(file.split("-")[0]) == 32}
    assert {path.name for path in tmp_path.iterdir()} == recorded


def test_second_start_loads_and_broken_cache_is_rebuilt(golden_blend, build_gpt, tmp_path, caplog):
    config, sizes, facts = golden_blend("w3", path_to_cache=str(tmp_path))
    first = build_gpt(config, sizes)[0]
    assert first.built_anew_on_cache_miss
    second = build_gpt(config, sizes)[0]
    assert not second.built_anew_on_cache_miss
    path = tmp_path / f"{facts['train']['hash']}-BlendedDataset-train-dataset_index.npy"
    path.write_bytes(path.read_bytes()[:-10])
    third = build_gpt(config, sizes)[0]
    assert third.built_anew_on_cache_miss
    assert "unusable" in caplog.text
    assert np.array_equal(first.dataset_index, third.dataset_index)


def test_weights_need_sizes(golden_blend, build_gpt):
    config, _, _ = golden_blend("w3")
    with pytest.raises(ConfigError, match="the number of train samples is needed"):
        build_gpt(config, [None, 1, 1])


def test_member_without_data_is_named(write_corpus, gpt_config, build_gpt):
    good, small = write_corpus([[1] * 50] * 10, "good"), write_corpus([[1]], "small")
    config = gpt_config(blend=([good, small], [0.5, 0.5]), split="1,0,0")
    with pytest.raises(DataError, match=rf"train split of {small} holds 1 tokens"):
        build_gpt(config, [10, 0, 0])


def test_splits_nothing_is_asked_of(write_corpus, gpt_config, build_gpt):
    prefixes = [write_corpus([[1] * 50] * 2, name) for name in "ab"]
    for weights in ([0.5, 0.5], None):
        config = gpt_config(blend=(prefixes, weights), split="40,40,20")
        train, valid, test = build_gpt(config, [4, 0, 0])
        assert (len(train), len(valid), test) == (4, 0, None)


def test_one_mistyped_member_among_many(write_corpus, gpt_config, build_gpt, tmp_path):
    good = write_corpus([[1] * 50] * 4, "good")
    config = gpt_config(
        blend=([good, str(tmp_path / "goof")], None), split="1", num_dataset_builder_threads=2
    )
    with pytest.raises(DataError, match=r"no data set .*goof"):
        build_gpt(config, [4, 0, 0])


def test_what_cannot_be_blended(write_corpus, gpt_config, build_gpt):
    config = gpt_config(blend=([write_corpus([[1] * 50] * 4)], None), split="50,50")
    train, valid, _ = build_gpt(config, [4, 4, 0])
    mock = build_gpt(gpt_config(sequence_length=4096), [4, 4, 4], MockGPTDataset)[0]
    cases = [
        ([], [], 4, "1 to 32766 members"),
        ([train, train], [1.0], 4, "2 members but 1 weights"),
        ([train, mock], [1.0, 1.0], 4, "several classes"),
        ([train, valid], [1.0, 1.0], 4, "several splits"),
        ([train, train], [1.0, 1], 4, "several types"),
        ([train, train], [1.0, 0.0], 4, "greater than 0"),
        ([train, train], [0.5, 0.5], None, "numbers of samples"),
        ([train, train], [0.5, 0.5], -1, "not be negative"),
    ]
    for datasets, weights, size, problem in cases:
        with pytest.raises(ConfigError, match=problem):
            BlendedDataset(datasets, weights, size, config)


def test_overdrawn_member(write_corpus, gpt_config, build_gpt):
    config = gpt_config(blend=([write_corpus([[1] * 50] * 4)], None), split="1")
    train = build_gpt(config, [4, 0, 0])[0]
    blend = BlendedDataset([train, train], [0.9, 0.1], 10 * len(train), config)
    with pytest.raises(DataError, match=rf"draws {9 * len(train)} samples from .*, which has {len(train)}\."):
        blend.check_member_sizes()


def test_three_sizes_are_needed(gpt_config):
    with pytest.raises(ConfigError, match="sizes needs 3 entries"):
        BlendedMegatronDatasetBuilder(GPTDataset, [1, 1], lambda: True, gpt_config())
