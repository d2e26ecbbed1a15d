"""Optimizers: mixed precision, loss scaling, clipping, and the update itself."""

from megatron import unbuilt
from megatron.core.optimizer.adamw import Adam
from megatron.core.optimizer.builder import (
    _get_megatron_optimizer_based_on_param_groups,
    get_megatron_optimizer,
    logger,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_groups import (
    _get_param_groups,
    _get_param_groups_and_buffers,
    _update_min_and_max_lr_in_param_groups,
)
from megatron.core.optimizer.torch_optimizers import SGD

__getattr__ = unbuilt.names_of(__name__)
