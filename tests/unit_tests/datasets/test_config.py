"""--split, --data-path and the settings made of them."""

import json

import numpy as np
import pytest

from megatron.core.datasets.blended_megatron_dataset_config import (
    BlendedMegatronDatasetConfig,
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split, compile_helpers, get_blend_from_list, normalize
from megatron.core.errors import ConfigError
from tests.unit_tests.test_public_names import problems_in


def test_splits(data):
    for text, case in json.loads((data / "splits.json").read_text()).items():
        vector = parse_and_normalize_split(text)
        assert vector == case["vector"]
        matrix = convert_split_vector_to_split_matrix(vector)
        assert [interval and list(interval) for interval in matrix] == case["matrix"]


@pytest.mark.parametrize(
    "text,problem",
    [
        ("", "not a list of numbers"),
        ("all,0,0", "not a list of numbers"),
        ("1e-3,1,1", "not a list of numbers"),
        ("-1,2,3", "negative"),
        ("90, -5, 15", "negative"),
        ("1.2.3,1,1", "could not convert"),
        (".,1", "could not convert"),
        ("0,0,0", "all shares are 0"),
        ("1,1,1,1", "has 4 shares"),
    ],
)
def test_bad_splits(text, problem):
    with pytest.raises(ConfigError, match=rf"{problem}.*such as 969,30,1"):
        parse_and_normalize_split(text)


def test_two_split_vectors():
    both = convert_split_vector_to_split_matrix([0.99, 0.01, 0.0], [0.98, 0.02, 0.0])
    assert both == [(0, 0.98), (0.99, 1.0), None]
    assert convert_split_vector_to_split_matrix([0.5, 0.5, 0.0], [0.2, 0.2, 0.6])[1] is None


def test_word_lists(data):
    for words, (prefixes, weights) in json.loads((data / "data_path_forms.json").read_text()).items():
        assert get_blend_from_list(words.split(" | ")) == (prefixes, weights)
    assert get_blend_from_list(None) is None


@pytest.mark.parametrize("words,bad", [(["0.3", "p", "q", "r"], "q"), (["p", "q", "0.5", "r"], "p")])
def test_weights_for_some_only(words, bad):
    with pytest.raises(ConfigError, match=rf"a blend mixes.* has '{bad}' where a weight"):
        get_blend_from_list(words)


@pytest.mark.parametrize(
    "settings,problem",
    [
        ({"blend": (["p"], None)}, "needs a split"),
        ({"blend": (["p"], None), "blend_per_split": [None, None, None], "split": "1"}, "both"),
        ({"blend_per_split": [(["p"], None), None, None], "split": "1"}, "blend_per_split"),
        ({"blend_per_split": [(["p"], None)]}, "needs 3 entries"),
        ({"blend": (["p", "q"], [1.0]), "split": "1"}, "2 data sets but 1 weights"),
        ({"blend": (["p", "q"], [1.0, 0.0]), "split": "1"}, "weight of q is 0.0"),
        ({"blend": (["p", "q"], [1.0, float("nan")]), "split": "1"}, "weight of q is nan"),
        ({"blend": ([], None), "split": "1"}, "names no data set"),
    ],
)
def test_contradictory_settings(settings, problem):
    with pytest.raises(ConfigError, match=problem):
        BlendedMegatronDatasetConfig(random_seed=1, sequence_length=8, **settings)


def test_no_data_means_mock():
    config = BlendedMegatronDatasetConfig(random_seed=1, sequence_length=8)
    assert config.mock
    assert config.split == "1,1,1"
    assert config.split_matrix[2] == (0.6666666666666666, 1.0)


def test_required_gpt_settings(gpt_config):
    with pytest.raises(ConfigError, match="GPTDatasetConfig needs tokenizer, eod_mask_loss"):
        gpt_config(tokenizer=None, eod_mask_loss=None)


def test_small_helpers():
    assert [split.value for split in (Split.train, Split.valid, Split.test)] == [0, 1, 2]
    assert normalize([30, 70, 100]) == [0.15, 0.35, 0.5]
    assert np.isclose(sum(normalize([0.1] * 7)), 1)
    assert compile_helpers() is None


def test_defaults_are_the_original_ones() -> None:
    assert problems_in("megatron.core.datasets") == []
