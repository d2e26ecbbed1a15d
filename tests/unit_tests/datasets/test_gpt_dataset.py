"""GPT samples: golden indices, masks, mock data, the cache, and bad data."""

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.datasets.gpt_dataset import MockGPTDataset, MockGPTLowLevelDataset
from megatron.core.errors import DataError

SPLITS = ("train", "valid", "test")
INDICES = ("document_index", "sample_index", "shuffle_index")
CASES = [
    "one_epoch",
    "none_sizes",
    "multi_sep",
    "multi_nosep",
    "short_seq",
    "no_extra_token",
    "keep_partial",
    "all_train",
]


def tokens_and_last_label(sample: dict) -> list[int]:
    return [*sample["tokens"].tolist(), int(sample["labels"][-1])]


@pytest.fixture
def golden_case(in_data, gpt_config, tmp_path):
    """Configuration, sizes and recorded facts of one golden case; the cache goes to tmp_path."""

    def load(name: str, **settings) -> tuple:
        case = next(case for case in json.loads(Path("cases.json").read_text()) if case["name"] == name)
        config = gpt_config(
            random_seed=case["seed"],
            sequence_length=case["seq_length"],
            blend=([case["prefix"]], None),
            split=case["split"],
            **{"path_to_cache": str(tmp_path / "cache"), **case["extra"], **settings},
        )
        return config, case["sizes"], json.loads(Path(f"gpt_{name}/info.json").read_text())

    return load


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_golden_indices_and_samples(golden_case, build_gpt, tmp_path, name, mmap):
    config, sizes, facts = golden_case(name, mmap_bin_files=mmap)
    for split, dataset in zip(SPLITS, build_gpt(config, sizes), strict=True):
        fact = facts[split]
        if fact is None:
            assert dataset is None
            continue
        assert dataset.unique_description == fact["description"]
        assert dataset.unique_description_hash == fact["hash"]
        assert dataset.indices.tolist() == list(range(*fact["indices"]))
        assert len(dataset) == fact["len"]
        for index in INDICES:
            expected = np.load(f"gpt_{name}/{split}_{index}.npy")
            cached = np.load(tmp_path / "cache" / f"{fact['base']}-{index}.npy")
            for found in (getattr(dataset, index), cached):
                assert found.dtype == expected.dtype
                assert np.array_equal(found, expected)
        assert (tmp_path / "cache" / f"{fact['base']}-description.txt").read_text() == fact["description"]
        for i, expected in enumerate(np.load(f"gpt_{name}/{split}_first_tokens.npy").tolist()):
            assert tokens_and_last_label(dataset[i]) == expected


@pytest.mark.parametrize("setting", ["000", "001", "010", "100", "111"])
def test_masks(in_data, gpt_config, build_gpt, tmp_path, setting):
    positions, attention, loss = setting
    config = gpt_config(
        sequence_length=48,
        blend=(["u16_text_document"], None),
        split="100,0,0",
        reset_position_ids=positions == "1",
        reset_attention_mask=attention == "1",
        eod_mask_loss=loss == "1",
        create_attention_mask=True,
        path_to_cache=str(tmp_path),
    )
    dataset = build_gpt(config, [50, 1, 1])[0]
    expected = np.load(f"gpt_masks/masks_rp{positions}_ra{attention}_em{loss}.npz")
    types = json.loads(Path("gpt_masks/dtypes.json").read_text())
    samples = {**{f"s{i}": dataset[i] for i in range(4)}, "none": dataset[None]}
    assert {f"{name}_{key}" for name, sample in samples.items() for key in sample} == set(expected)
    for name, sample in samples.items():
        for key, value in sample.items():
            assert np.array_equal(value.numpy(), expected[f"{name}_{key}"]), (name, key)
            assert [str(value.dtype), list(value.shape)] == types[key]


def test_padded_sample(golden_case, build_gpt):
    config, sizes, _ = golden_case("keep_partial")
    valid = build_gpt(config, sizes)[1]
    expected = np.load("gpt_masks/padded_last_valid.npz")
    sample = valid[int(expected["idx"])]
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        assert np.array_equal(sample[key].numpy(), expected[key]), key
    other = valid[(int(expected["idx"]) + 1) % len(valid)]
    assert other["loss_mask"].all()  # padding of one sample does not leak into the next


def test_pad_id_of_the_tokenizer(write_corpus, gpt_config, build_gpt, tmp_path):
    prefix = write_corpus([[7, 3, 7, 9, 8]])
    config = gpt_config(
        blend=([prefix], None), split="1", sequence_length=4, path_to_cache=str(tmp_path / "c")
    )
    type(config.tokenizer).pad = property(lambda self: 7)
    try:
        sample = build_gpt(config, [1, 0, 0])[0][0]
    finally:
        del type(config.tokenizer).pad
    assert sample["tokens"].tolist() == [0, 3, 0, 9]
    assert sample["labels"].tolist() == [3, 0, 9, 8]
    assert sample["loss_mask"].tolist() == [1, 0, 1, 1]


def test_mock_data(data, gpt_config, build_gpt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = np.load(data / "gpt_mock.npz")
    config = gpt_config(sequence_length=32)
    datasets = build_gpt(config, [40, 8, 4], MockGPTDataset)
    assert [len(dataset) for dataset in datasets] == expected["lens"].tolist()
    for split, dataset in zip(SPLITS, datasets, strict=True):
        for i in range(4):
            assert tokens_and_last_label(dataset[i]) == expected[f"{split}_{i}"].tolist()
    low_level = MockGPTLowLevelDataset(config.tokenizer)
    assert low_level.sequence_lengths[:50].tolist() == expected["low_lengths"].tolist()
    assert len(low_level) == 100_000
    n = int(low_level.sequence_lengths[3])
    assert low_level[3].tolist() == [*range(1, n), 500]
    assert low_level.get(3, 2, 5).tolist() == [3, 4, 5, 6, 7]
    assert low_level.get(3, n - 2).tolist() == [n - 1, 500]
    assert os.listdir(tmp_path) == []  # mock data is not cached unless a directory is named


# ---- the cache


@pytest.fixture
def one_split(write_corpus, gpt_config, build_gpt, tmp_path):
    """Build the train split of a small corpus, with its cache beside it."""
    random = np.random.default_rng(0)
    prefix = write_corpus([random.integers(0, 500, size=random.integers(1, 9)) for _ in range(40)])

    def build(**settings):
        return build_gpt(gpt_config(blend=([prefix], None), split="1", **settings), [30, 0, 0])[0]

    build.directory = Path(prefix) / "cache" / "GPTDataset_indices"
    return build


def indices_of(dataset) -> list:
    return [np.array(getattr(dataset, name)) for name in INDICES]


def same(a: list, b: list) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_second_start_loads(one_split):
    first = one_split()
    second = one_split()
    assert (first.built_anew_on_cache_miss, second.built_anew_on_cache_miss) == (True, False)
    assert all(isinstance(getattr(second, name), np.memmap) for name in INDICES)
    assert same(indices_of(first), indices_of(second))
    assert len(os.listdir(one_split.directory)) == 4


@pytest.mark.parametrize("affix", [f"{name}.npy" for name in INDICES])
@pytest.mark.parametrize("damage", ["cut", "emptied", "garbage", "foreign"])
def test_broken_cache_is_built_again(one_split, caplog, affix, damage):
    first = one_split()
    path = next(one_split.directory.glob(f"*-{affix}"))
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 4)
    elif damage == "emptied":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(b"\x80" * 200)
    else:
        np.save(path, np.zeros(3))
    second = one_split()
    assert second.built_anew_on_cache_miss
    assert "unusable" in caplog.text
    assert "building it again" in caplog.text
    assert same(indices_of(first), indices_of(second))
    assert not one_split().built_anew_on_cache_miss


@pytest.mark.parametrize("affix", ["description.txt", "sample_index.npy"])
def test_incomplete_cache_is_built_again(one_split, affix):
    one_split()
    next(one_split.directory.glob(f"*-{affix}")).unlink()
    assert one_split().built_anew_on_cache_miss


@pytest.mark.parametrize("first", [True, False])
def test_cache_of_the_other_extra_token_setting(one_split, first):
    """The setting is not part of the key, so that keys stay those of other programs."""
    with_first = one_split(add_extra_token_to_sequence=first)
    other = one_split(add_extra_token_to_sequence=not first)
    assert with_first.unique_description_hash == other.unique_description_hash
    assert other.built_anew_on_cache_miss
    assert len(other[0]["tokens"]) == 8
    assert not one_split(add_extra_token_to_sequence=not first).built_anew_on_cache_miss


def test_interrupted_writer_leaves_no_entry(one_split, monkeypatch):
    real, saved = np.save, []

    def fail_on_the_last(file, array):
        saved.append(real(file, array))
        if len(saved) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(np, "save", fail_on_the_last)
    with pytest.raises(KeyboardInterrupt):
        one_split()
    names = os.listdir(one_split.directory)
    assert len(names) == 2
    assert not any("description" in name or "partial" in name for name in names)
    monkeypatch.undo()
    assert one_split().built_anew_on_cache_miss


def test_no_write_access(one_split, tmp_path):
    blocked = tmp_path / "a_file"
    blocked.write_text("not a directory")
    with pytest.raises(DataError, match=rf"cannot write the sample index to {blocked}.*path_to_cache"):
        one_split(path_to_cache=str(blocked))


def test_vocabulary_size_is_not_part_of_the_key(one_split):
    assert one_split().unique_description_hash == one_split(vocab_size=500).unique_description_hash


# ---- bad data


@pytest.mark.parametrize("bad,dtype", [(500, np.uint16), (65535, np.uint16), (-3, np.int32)])
def test_token_id_beyond_the_vocabulary(write_corpus, gpt_config, build_gpt, bad, dtype):
    prefix = write_corpus([[499] * 7 + [bad, 0] + [499] * 7] * 3, dtype=dtype)
    config = gpt_config(blend=([prefix], None), split="1", vocab_size=500, sequence_length=5)
    dataset = build_gpt(config, [4, 0, 0])[0]
    with pytest.raises(
        DataError,
        match=rf"{prefix} holds token id {bad} .*vocabulary has 500 ids.*GPTDatasetConfig.tokenizer",
    ):
        list(map(dataset.__getitem__, range(len(dataset))))
    config = gpt_config(blend=([prefix], None), split="1", vocab_size=None, sequence_length=5)
    dataset = build_gpt(config, [4, 0, 0])[0]
    assert bad in torch.stack([dataset[i]["labels"] for i in range(len(dataset))])


@pytest.mark.parametrize("document", [0, 2, 5])
def test_the_document_of_a_bad_id_is_named(write_corpus, gpt_config, build_gpt, document):
    documents = [[number] * 3 for number in range(1, 7)]
    documents[document][1] = 77
    prefix = write_corpus(documents)
    # A sample holds tokens of several documents.
    config = gpt_config(blend=([prefix], None), split="1", vocab_size=50, sequence_length=8)
    dataset = build_gpt(config, [2, 0, 0])[0]
    with pytest.raises(DataError, match=rf"token id 77 in document {document} \(train sample \d\)"):
        list(map(dataset.__getitem__, range(len(dataset))))


def test_mock_ids_beyond_the_vocabulary(gpt_config, build_gpt):
    dataset = build_gpt(gpt_config(vocab_size=10, sequence_length=4096), [4, 1, 1], MockGPTDataset)[0]
    with pytest.raises(DataError, match=r"the mock data holds token id .* set vocab_size to 4095 or more"):
        dataset[0]


def test_five_token_corpus(write_corpus, gpt_config, build_gpt):
    prefix = write_corpus([[1, 2, 3, 4, 5]])
    for split in ("969, 30, 1", "1,0,0"):
        with pytest.raises(
            DataError, match=rf"train split of {prefix} holds 5 tokens in 1 seq.* fewer than the 9"
        ):
            build_gpt(gpt_config(blend=([prefix], None), split=split), [10, 5, 5])


def test_evaluation_splits_that_round_to_nothing_are_left_out(write_corpus, gpt_config, build_gpt, caplog):
    prefix = write_corpus([[1] * 20] * 10)
    train, valid, test = build_gpt(gpt_config(blend=([prefix], None), split="969, 30, 1"), [10, 5, 5])
    assert len(train) >= 10 and valid is None and test is None
    (first, second) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert first.startswith(f"the valid split of {prefix} is empty: split 969, 30, 1 gives it the interval")
    assert "of 10 sequences, which rounds to none: it is left out" in first and "the test split" in second


def test_training_split_that_rounds_to_nothing_is_an_error(write_corpus, gpt_config, build_gpt):
    prefix = write_corpus([[1] * 20] * 10)
    with pytest.raises(DataError, match=rf"train split of {prefix} is empty: split 1,98,1"):
        build_gpt(gpt_config(blend=([prefix], None), split="1,98,1"), [10, 5, 5])


def test_blend_leaves_members_without_elements_out_of_a_split(write_corpus, gpt_config, build_gpt):
    small, large = write_corpus([[1] * 20] * 10, "small"), write_corpus([[2] * 20] * 1000, "large")
    for weights in ([0.5, 0.5], None):
        config = gpt_config(blend=([small, large], weights), split="900,99,1")
        train, valid, test = build_gpt(config, [40, 20, 2])
        assert len(train) >= 40 and len(valid.datasets) == 2
        assert [member.dataset_path for member in test.datasets] == [large]
        assert {int(token) for token in test[0]["tokens"]} == {2}


def test_five_token_corpus_of_single_tokens(write_corpus, gpt_config, build_gpt):
    prefix = write_corpus([[i] for i in range(5)])
    with pytest.raises(DataError, match=r"train split .* holds 5 tokens in 5 sequences"):
        build_gpt(gpt_config(blend=([prefix], None), split="100,0,0"), [10, 0, 0])


def test_empty_data_sets(write_corpus, gpt_config, build_gpt):
    prefix = write_corpus([])
    with pytest.raises(DataError, match=rf"{prefix} is empty: it holds no sequence"):
        build_gpt(gpt_config(blend=([prefix], None), split="1,0,0"), [10, 0, 0])
    prefix = write_corpus([[], [], []], "hollow")
    for sizes in ([10, 0, 0], [None, None, None]):
        with pytest.raises(DataError, match=r"train split .* holds 0 tokens in 3 sequences"):
            build_gpt(gpt_config(blend=([prefix], None), split="1,0,0"), sizes)


def test_small_evaluation_split_is_repeated(write_corpus, gpt_config, build_gpt, caplog):
    prefix = write_corpus([[1] * 30, [2, 3]])
    with caplog.at_level(logging.WARNING):
        valid = build_gpt(gpt_config(blend=([prefix], None), split="50,50"), [3, 2, 0])[1]
    assert "valid split" in caplog.text
    assert "repeated" in caplog.text
    assert valid[0]["tokens"].tolist() == [2, 3] * 4


def test_splits_nothing_is_asked_of(write_corpus, gpt_config, build_gpt):
    prefix = write_corpus([[1] * 30, [2, 3]])
    _, valid, test = build_gpt(gpt_config(blend=([prefix], None), split="40,40,20"), [3, 0, 0])
    assert len(valid) == 0
    assert test is None


def test_workers_read_the_same(one_split):
    dataset = one_split()
    direct = torch.stack([dataset[i]["tokens"] for i in range(len(dataset))])
    worker = torch.utils.data.DataLoader(dataset, 1, num_workers=1, multiprocessing_context="fork")
    sent = torch.utils.data.DataLoader(pickle.loads(pickle.dumps(dataset)), 1)  # as with spawn
    for loader in (worker, sent):
        assert torch.equal(torch.cat([batch["tokens"] for batch in loader]), direct)
