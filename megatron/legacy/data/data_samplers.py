"""Import path kept for scripts; the samplers live in ``megatron.training.data.samplers``."""

from megatron.training.data.samplers import (
    MegatronPretrainingRandomSampler,
    MegatronPretrainingSampler,
    RandomSeedDataset,
    build_pretraining_data_loader,
)

__all__ = [
    "MegatronPretrainingRandomSampler",
    "MegatronPretrainingSampler",
    "RandomSeedDataset",
    "build_pretraining_data_loader",
]
