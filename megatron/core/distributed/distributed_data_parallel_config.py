"""Settings of gradient accumulation and reduction."""

from dataclasses import dataclass


@dataclass
class DistributedDataParallelConfig:
    """Settings of :class:`megatron.core.distributed.DistributedDataParallel`."""

    grad_reduce_in_fp32: bool = False
    """Gradients in fp32 whatever the parameters' type."""
    overlap_grad_reduce: bool = False
    """Reduce buckets of gradients while backward still runs."""
    overlap_param_gather: bool = False
    """Gather sharded parameters while forward runs."""
    align_param_gather: bool = False
    """All pipeline stages start to gather together."""
    use_distributed_optimizer: bool = False
    """Optimizer state sharded over the data-parallel ranks."""
    num_distributed_optimizer_instances: int = 1
    """Copies of the sharded state over the data-parallel ranks."""
    check_for_nan_in_grad: bool = False
    """Stop at NaN or Inf among this rank's gradients, before they are reduced."""
    check_for_large_grads: bool = False
    """Warn of gradients whose norm is ten times the usual."""
    bucket_size: int | None = None
    """Elements of a bucket; None for a size that suits the number of ranks."""
    pad_buckets_for_high_nccl_busbw: bool = False
    """Bucket ends at multiples of 2^16 elements."""
    average_in_collective: bool = False
    """Average inside the collective instead of scaling before it."""
    fp8_param_gather: bool = False
    """Gather parameters in fp8."""
    use_custom_fsdp: bool = False
    """Shard parameters fully, by the library's own code."""
    data_parallel_sharding_strategy: str = "no_shard"
    """What full sharding shards."""
    gradient_reduce_div_fusion: bool = True
    """Full sharding: divide inside the reduction."""
    suggested_communication_unit_size: int | None = None
    """Full sharding: elements of a message."""
    preserve_fp32_weights: bool = True
    """Full sharding: keep fp32 weights."""
    keep_fp8_transpose_cache_when_using_custom_fsdp: bool = False
    """Full sharding: keep transposed fp8 weights."""
