"""The names of Megatron's compiled index helpers, as NumPy functions."""

import numpy as np

from megatron.core.datasets.blending_index import greedy_choices, sample_numbers
from megatron.core.datasets.sample_index import build_sample_idx_int32, build_sample_idx_int64

__all__ = [
    "build_blending_indices",
    "build_exhaustive_blending_indices",
    "build_sample_idx_int32",
    "build_sample_idx_int64",
]


def build_blending_indices(
    dataset_index: np.ndarray,
    dataset_sample_index: np.ndarray,
    weights: np.ndarray,
    num_datasets: int,
    size: int,
    verbose: bool = False,
) -> None:
    """Fill both arrays for a blend of ``size`` samples, every member's share close to its weight throughout.

    Args:
        dataset_index: int16 [size], written: the member each sample comes from.
        dataset_sample_index: int64 [size], written: which of that member's samples it is.
        weights: float64 [num_datasets], sum 1.
        verbose: accepted for compatibility; nothing is printed.
    """
    choices = greedy_choices(np.asarray(weights)[:num_datasets], size)
    dataset_index[:size] = choices
    dataset_sample_index[:size] = sample_numbers(choices, num_datasets)


def build_exhaustive_blending_indices(
    dataset_index: np.ndarray, dataset_sample_index: np.ndarray, sizes: np.ndarray, num_datasets: int
) -> None:
    """Fill both arrays so that member k is used exactly ``sizes[k]`` times, spread evenly.

    Args:
        dataset_index: int16 [sum of sizes], written.
        dataset_sample_index: int64 [sum of sizes], written.
        sizes: int64 [num_datasets].
    """
    capacity = np.asarray(sizes, dtype=np.int64)[:num_datasets]
    total = int(capacity.sum())
    choices = greedy_choices(capacity / total, total, capacity) if total else np.empty(0, dtype=np.int16)
    dataset_index[:total] = choices
    dataset_sample_index[:total] = sample_numbers(choices, num_datasets)
