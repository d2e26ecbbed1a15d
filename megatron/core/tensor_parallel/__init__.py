"""Layers split over the tensor-parallel group, their collectives and random streams."""

import importlib
from typing import Any

# name -> submodule; imported on first use
_LAZY = {
    name: module
    for module, names in {
        "cross_entropy": ("VocabParallelCrossEntropy", "vocab_parallel_cross_entropy"),
        "data": ("broadcast_data",),
        "layers": (
            "ColumnParallelLinear",
            "LinearWithFrozenWeight",
            "LinearWithGradAccumulationAndAsyncCommunication",
            "RowParallelLinear",
            "VocabParallelEmbedding",
            "copy_tensor_model_parallel_attributes",
            "linear_with_frozen_weight",
            "linear_with_grad_accumulation_and_async_allreduce",
            "param_is_not_tensor_parallel_duplicate",
            "set_defaults_if_not_set_tensor_model_parallel_attributes",
            "set_tensor_model_parallel_attributes",
        ),
        "mappings": (
            "all_gather_last_dim_from_tensor_parallel_region",
            "all_to_all",
            "all_to_all_hp2sp",
            "all_to_all_sp2hp",
            "copy_to_tensor_model_parallel_region",
            "gather_from_sequence_parallel_region",
            "gather_from_tensor_model_parallel_region",
            "reduce_from_tensor_model_parallel_region",
            "reduce_scatter_last_dim_to_tensor_parallel_region",
            "reduce_scatter_to_sequence_parallel_region",
            "scatter_to_sequence_parallel_region",
            "scatter_to_tensor_model_parallel_region",
        ),
        "random": (
            "CheckpointWithoutOutput",
            "CudaRNGStatesTracker",
            "checkpoint",
            "get_all_rng_states",
            "get_cuda_rng_tracker",
            "get_data_parallel_rng_tracker_name",
            "get_expert_parallel_rng_tracker_name",
            "initialize_rng_tracker",
            "model_parallel_cuda_manual_seed",
        ),
        "utils": (
            "VocabUtility",
            "gather_split_1d_tensor",
            "split_tensor_along_last_dim",
            "split_tensor_into_1d_equal_chunks",
        ),
        "initial_weights": ("Place",),
        "weight_streams": ("weight_scope",),
    }.items()
    for name in names
}

__all__ = sorted(_LAZY)


def __getattr__(name: str) -> Any:
    if name in set(_LAZY.values()):
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value
