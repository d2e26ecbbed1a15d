"""What all data sets made of a low-level data set have in common: an identity and a range of it."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, Union

import numpy as np
import torch

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

LowLevelDataset = Union[IndexedDataset, Iterable]  # noqa: UP007


def describe(unique_identifiers: OrderedDict[str, Any]) -> tuple[str, str]:
    """Indented JSON of the identifiers, and the MD5 of that text; objects stand for their own identifiers."""
    text = json.dumps(unique_identifiers, indent=4, default=lambda value: value.unique_identifiers)
    return text, hashlib.md5(text.encode("utf-8"), usedforsecurity=False).hexdigest()


class MegatronDataset(ABC, torch.utils.data.Dataset):
    """Samples drawn from some elements of a low-level data set.

    Args:
        dataset: the low-level data set.
        dataset_path: its prefix; None for mock data.
        indices: the elements this split may use.
        num_samples: how many samples are wanted; None for one epoch.
        index_split: which split this is.
        config: settings.

    Attributes:
        unique_identifiers, unique_description, unique_description_hash: name this data set in caches.
        built_anew_on_cache_miss: True when the index was built here rather than loaded.
    """

    def __init__(
        self,
        dataset: LowLevelDataset,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        self.dataset = dataset
        self.dataset_path = dataset_path
        self.indices = indices
        self.num_samples = num_samples
        self.index_split = index_split
        self.config = config
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict()
        self.unique_identifiers["class"] = type(self).__name__
        self.unique_identifiers["dataset_path"] = dataset_path
        self.unique_identifiers["num_samples"] = num_samples
        self.unique_identifiers["index_split"] = index_split.name
        for attribute in self._key_config_attributes():
            self.unique_identifiers[attribute] = getattr(config, attribute)
        self.unique_description, self.unique_description_hash = describe(self.unique_identifiers)
        self.built_anew_on_cache_miss = False

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: LowLevelDataset) -> int:
        """How many elements there are to divide among the splits."""
        raise NotImplementedError

    @staticmethod
    def build_low_level_dataset(
        dataset_path: str | None, config: BlendedMegatronDatasetConfig
    ) -> LowLevelDataset:
        """Open the low-level data set."""
        raise NotImplementedError

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """Settings that are part of the identity."""
        return ["random_seed", "sequence_length", "split", "split_matrix", "tokenizer"]

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, idx: int) -> dict[str, torch.Tensor | np.ndarray]:
        """One sample."""
