"""Random streams, and recomputation that replays them: the public names of both rooms."""

from megatron.core.tensor_parallel.recompute import (
    CheckpointFunction,
    CheckpointWithoutOutput,
    CheckpointWithoutOutputFunction,
    checkpoint,
)
from megatron.core.tensor_parallel.rng_tracker import (
    _MODEL_PARALLEL_RNG_TRACKER_NAME,  # noqa: F401  (the default of fork(), which user code names)
    CudaRNGStatesTracker,
    RngStreamError,
    _get_cuda_rng_state,  # noqa: F401
    _set_cuda_rng_state,  # noqa: F401
    get_all_rng_states,
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
    initialize_rng_tracker,
    model_parallel_cuda_manual_seed,
)

__all__ = [
    "CheckpointFunction",
    "CheckpointWithoutOutput",
    "CheckpointWithoutOutputFunction",
    "CudaRNGStatesTracker",
    "RngStreamError",
    "checkpoint",
    "get_all_rng_states",
    "get_cuda_rng_tracker",
    "get_data_parallel_rng_tracker_name",
    "get_expert_parallel_rng_tracker_name",
    "initialize_rng_tracker",
    "model_parallel_cuda_manual_seed",
]
