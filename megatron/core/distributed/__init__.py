"""Data parallelism: gradients in contiguous buffers, and what is done to them before the optimizer's step."""

from megatron import unbuilt
from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

__getattr__ = unbuilt.names_of(__name__)
