"""Several data sets mixed by weight."""

import logging
from collections import OrderedDict
from typing import Any

import numpy as np
import torch

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.helpers import build_blending_indices, build_exhaustive_blending_indices
from megatron.core.datasets.index_cache import IndexCache
from megatron.core.datasets.megatron_dataset import MegatronDataset, describe
from megatron.core.datasets.utils import normalize
from megatron.core.errors import ConfigError, DataError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

_MAX_DATASETS = 32767  # members are numbered in int16
_INDEX_NAMES = ("dataset_index", "dataset_sample_index")


class BlendedDataset(torch.utils.data.Dataset):
    """A mixture in which every member's share stays close to its weight from the first sample on.

    Args:
        datasets: members, all of one class and split.
        weights: all floats (shares) or all ints (with ``size`` None: how often each member is used).
        size: number of samples; None to use every sample counted in ``weights`` once.
        config: settings.

    Raises:
        ConfigError: members or weights that do not fit together.
    """

    def __init__(
        self,
        datasets: list[MegatronDataset],
        weights: list[int | float],
        size: int | None,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        super().__init__()
        _check_members(datasets, weights, size)
        self.datasets = datasets
        self.split = datasets[0].index_split
        self.weights = weights if size is None else normalize(weights)
        self.size = size
        self.config = config
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict()
        self.unique_identifiers["class"] = type(self).__name__
        self.unique_identifiers["datasets"] = [dataset.unique_identifiers for dataset in datasets]
        self.unique_identifiers["split"] = self.split.name
        self.unique_identifiers["weights"] = self.weights
        self.unique_identifiers["size"] = size
        self.unique_description, self.unique_description_hash = describe(self.unique_identifiers)
        self.built_anew_on_cache_miss = False
        self.dataset_index, self.dataset_sample_index = self._load_or_build_index()

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset_index)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor | np.ndarray | int]:
        """The member's sample, and ``dataset_id`` (int16): which member."""
        member = self.dataset_index[idx]
        return {"dataset_id": member, **self.datasets[member][self.dataset_sample_index[idx]]}

    def _load_or_build_index(self) -> tuple[np.ndarray, np.ndarray]:
        samples = int(sum(self.weights)) if self.size is None else self.size
        cache = self._cache()
        arrays = cache and cache.load(lambda *found: _find_fault(samples, len(self.datasets), *found))
        if arrays:
            members, places = arrays
            return members, places
        log_single_rank(logger, logging.INFO, f"Build and save the {type(self).__name__} indices")
        self.built_anew_on_cache_miss = True
        arrays = np.empty(samples, dtype=np.int16), np.empty(samples, dtype=np.int64)
        if self.size is None:
            build_exhaustive_blending_indices(
                *arrays, np.array(self.weights, dtype=np.int64), len(self.datasets)
            )
        else:
            weights = np.array(normalize(self.weights))
            build_blending_indices(*arrays, weights, len(self.datasets), self.size, False)
        if cache and self.config.writes_index():
            cache.store(arrays)
        return arrays

    def _cache(self) -> IndexCache | None:
        """Blends are cached only where ``path_to_cache`` says."""
        if self.config.path_to_cache is None:
            return None
        stem = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}"
        return IndexCache(self.config.path_to_cache, stem, self.unique_description, _INDEX_NAMES)

    def check_member_sizes(self) -> None:
        """Compare what the blend draws from each member with what that member has.

        Raises:
            DataError: a member has too few samples.
        """
        wanted = np.bincount(self.dataset_index, minlength=len(self.datasets))
        for dataset, count in zip(self.datasets, wanted.tolist(), strict=True):
            if count > len(dataset):
                raise DataError(
                    f"the {self.split.name} blend draws {count} samples from {dataset.dataset_path}, which "
                    f"has {len(dataset)}. Lower its weight, or train for fewer samples."
                )


def _check_members(datasets: list[MegatronDataset], weights: list[int | float], size: int | None) -> None:
    problem = None
    if not 0 < len(datasets) < _MAX_DATASETS:
        problem = f"a blend has 1 to {_MAX_DATASETS - 1} members, not {len(datasets)}"
    elif len(datasets) != len(weights):
        problem = f"{len(datasets)} members but {len(weights)} weights"
    elif len({type(dataset) for dataset in datasets}) > 1:
        problem = (
            f"members are of several classes: {sorted({type(dataset).__name__ for dataset in datasets})}"
        )
    elif len({dataset.index_split for dataset in datasets}) > 1:
        problem = (
            f"members are of several splits: {sorted({dataset.index_split.name for dataset in datasets})}"
        )
    elif len({type(weight) for weight in weights}) > 1:
        problem = f"weights are of several types: {weights}"
    elif any(weight <= 0 for weight in weights):
        problem = f"all weights must be greater than 0: {weights}"
    elif size is None and not isinstance(weights[0], (int, np.integer)):
        problem = f"without a size, weights are numbers of samples (ints), not {weights}"
    elif size is not None and size < 0:
        problem = f"the size must not be negative: {size}"
    if problem:
        raise ConfigError(f"cannot blend: {problem}.")


def _find_fault(
    samples: int, members: int, dataset_index: np.ndarray, dataset_sample_index: np.ndarray
) -> str | None:
    """What shows that cached arrays do not belong to this blend, or None."""
    found = dataset_index.shape, dataset_sample_index.shape
    if found != ((samples,), (samples,)):
        return f"array shapes {found}, expected {samples} samples"
    if (dataset_index.dtype, dataset_sample_index.dtype) != (np.int16, np.int64):
        return f"array types {dataset_index.dtype}, {dataset_sample_index.dtype}"
    if samples and not 0 <= int(dataset_index[-1]) < members:
        return f"member {dataset_index[-1]} of {members}"
    return None
