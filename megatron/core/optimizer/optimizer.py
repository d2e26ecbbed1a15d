"""Public home of the optimizer classes; each lives in a module of its own."""

from megatron.core.optimizer.base import FP32Optimizer, MegatronOptimizer
from megatron.core.optimizer.chained import ChainedOptimizer, ProxyDict
from megatron.core.optimizer.mixed_precision import Float16OptimizerWithFloat16Params, MixedPrecisionOptimizer

__all__ = [
    "ChainedOptimizer",
    "FP32Optimizer",
    "Float16OptimizerWithFloat16Params",
    "MegatronOptimizer",
    "MixedPrecisionOptimizer",
    "ProxyDict",
]
