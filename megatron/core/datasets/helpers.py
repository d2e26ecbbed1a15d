"""Index building for GPT samples and blends."""

from megatron.core.datasets.helpers_cpp import (
    build_blending_indices,
    build_exhaustive_blending_indices,
    build_sample_idx_int32,
    build_sample_idx_int64,
)
from megatron.core.datasets.sample_index import build_sample_idx

__all__ = [
    "build_blending_indices",
    "build_exhaustive_blending_indices",
    "build_sample_idx",
    "build_sample_idx_int32",
    "build_sample_idx_int64",
]
