"""A tokenizer as the golden figures were made with, and ways to make small data sets."""

from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.training.tokenizer.tokenizer import _NullTokenizer

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="session")
def data(golden: Path) -> Path:
    return golden / "data"


@pytest.fixture
def in_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prefixes are part of hashes, and the golden ones are bare names."""
    monkeypatch.chdir(data)
    return data


@pytest.fixture
def gpt_config():
    """Make a GPTDatasetConfig, with plain values for what a test does not say."""

    def make(**settings) -> GPTDatasetConfig:
        defaults = {
            "random_seed": 1234,
            "sequence_length": 8,
            "tokenizer": _NullTokenizer(500),
            "reset_position_ids": False,
            "reset_attention_mask": False,
            "eod_mask_loss": False,
            "create_attention_mask": False,
        }
        return GPTDatasetConfig(**{**defaults, **settings})

    return make


@pytest.fixture
def build_gpt():
    """Build the three GPT splits."""

    def build(config: GPTDatasetConfig, sizes: list[int | None], cls: type = GPTDataset) -> list:
        return BlendedMegatronDatasetBuilder(cls, sizes, lambda: True, config).build()

    return build


@pytest.fixture
def write_corpus(tmp_path: Path):
    """Write sequences, one document each; returns the prefix."""

    def write(sequences: list, name: str = "corpus", dtype: type = np.uint16) -> str:
        prefix = str(tmp_path / name)
        builder = IndexedDatasetBuilder(prefix + ".bin", dtype=dtype)
        for sequence in sequences:
            builder.add_document(np.asarray(sequence, dtype=np.int64), [len(sequence)])
        builder.finalize(prefix + ".idx")
        return prefix

    return write
