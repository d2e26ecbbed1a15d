"""Settings of parallelism, precision and scheduling that every model shares."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.errors import ConfigError


@dataclass
class ModelParallelConfig:
    """Base of all model configs.  Unset values are derived, then all rules are checked at once.

    Raises:
        ConfigError: settings that contradict each other; the message lists every one with a way out.
    """

    tensor_model_parallel_size: int = 1  # tensor parallel degree
    # separate backend for pipeline traffic (nccl/ucc)
    pipeline_model_parallel_comm_backend: str | None = None
    pipeline_model_parallel_size: int = 1  # pipeline parallel degree (decoder)
    virtual_pipeline_model_parallel_size: int | None = None  # virtual stages per pipeline rank
    sequence_parallel: bool = False  # split norm/dropout activations along sequence in the TP group
    context_parallel_size: int = 1  # context parallel degree
    hierarchical_context_parallel_sizes: list[int] | None = None  # nested CP sizes
    expert_model_parallel_size: int = 1  # expert parallel degree
    expert_tensor_parallel_size: int | None = None  # TP degree inside experts
    moe_extended_tp: bool = False  # withdrawn; use expert_tensor_parallel_size
    perform_initialization: bool = True  # draw initial weights
    use_cpu_initialization: bool = False  # draw the full weight on CPU and slice per TP rank
    fp16: bool = False  # train in fp16 with loss scaling
    bf16: bool = False  # train in bf16
    params_dtype: torch.dtype = torch.float32  # dtype of weights
    timers: Callable[..., Any] | None = None  # Timers object or None
    # called by the schedule after the last backward with (model_chunks, num_tokens or None)
    finalize_model_grads_func: Callable[..., Any] | None = None
    # maps loss to scaled loss before backward (the optimizer's scale_loss)
    grad_scale_func: Callable[..., Any] | None = None
    # context (or list of contexts per chunk) that suspends gradient reduction
    no_sync_func: Callable[..., Any] | None = None
    grad_sync_func: Callable[..., Any] | None = None  # starts asynchronous gradient reduction for a chunk
    param_sync_func: Callable[..., Any] | None = None  # starts asynchronous parameter gathering for a chunk
    deterministic_mode: bool = False  # only deterministic kernels
    enable_autocast: bool = False  # run forward under autocast
    autocast_dtype: torch.dtype | None = None  # autocast dtype
    # how many in-flight micro-batches use partial recompute only
    num_microbatches_with_partial_activation_checkpoints: int | None = None
    gradient_accumulation_fusion: bool = False  # wgrad GEMM adds straight into main_grad
    async_tensor_model_parallel_allreduce: bool = False  # old switch without effect
    use_te_rng_tracker: bool = False  # use TE's random tracker
    tp_comm_overlap: bool = False  # TE user-buffer overlap of TP collectives and GEMM
    tp_comm_bulk_wgrad: bool = True  # TE bulk wgrad overlap
    tp_comm_bulk_dgrad: bool = True  # TE bulk dgrad overlap
    tp_comm_overlap_ag: bool = True  # TE all-gather/GEMM overlap
    tp_comm_overlap_rs: bool = True  # TE GEMM/reduce-scatter overlap
    tp_comm_overlap_rs_dgrad: bool = False  # TE user-buffer reduce-scatter with dgrad
    tp_comm_split_ag: bool = True  # old TE overlap switch
    tp_comm_atomic_ag: bool = False  # old TE overlap switch
    tp_comm_split_rs: bool = True  # old TE overlap switch
    tp_comm_atomic_rs: bool = False  # old TE overlap switch
    # pieces into which matmuls of split layers are cut, so that one travels while the next is multiplied
    tp_comm_chunks: int = 1
    # matmuls of split layers in one kernel with the traffic of sequence parallelism, where the device has it
    tp_comm_fused_matmul: bool = False
    cross_entropy_loss_fusion: bool = False  # fused vocabulary-parallel cross entropy
    cross_entropy_fusion_impl: str = "native"  # native or TE kernel for fused cross entropy
    tp_comm_overlap_disable_qkv: bool = False  # leave QKV out of TE overlap
    tp_comm_overlap_disable_fc1: bool = False  # leave fc1 out of TE overlap
    tp_comm_bootstrap_backend: str = "nccl"  # bootstrap transport of TE user buffers
    pipeline_dtype: torch.dtype | None = None  # dtype of tensors sent between stages, required if PP>1
    variable_seq_lengths: bool = False  # exchange tensor shapes before every stage transfer
    overlap_p2p_comm: bool = False  # overlap stage transfers with compute (interleaved schedule)
    batch_p2p_comm: bool = True  # send and receive through one batched call
    batch_p2p_sync: bool = True  # device synchronise after a batched call
    use_ring_exchange_p2p: bool = False  # custom torch build feature
    deallocate_pipeline_outputs: bool = False  # free the data of a sent output while keeping its graph node
    defer_embedding_wgrad_compute: bool = False  # move output-layer wgrad into the pipeline flush
    wgrad_deferral_limit: int = 0  # how many micro-batches to defer
    pipeline_model_parallel_split_rank: int | None = None  # old way to split encoder/decoder stages
    overlap_p2p_comm_warmup_flush: bool = False  # overlap sends in warmup and flush too
    # microbatches issued back to back per virtual stage
    microbatch_group_size_per_vp_stage: int | None = None
    # 1f1b, interleaved or zb-h1; None chooses by the number of virtual stages
    pipeline_schedule: str | None = None
    cpu_offloading: bool = False  # TE activation offloading to host
    cpu_offloading_num_layers: int = 0  # how many layers to offload
    _cpu_offloading_context: contextlib.AbstractContextManager | None = None  # internal context manager
    cpu_offloading_activations: bool = True  # offload activations
    cpu_offloading_weights: bool = True  # offload weights
    barrier_with_L1_time: bool = True  # barrier before level-1 timers

    def __post_init__(self) -> None:
        self._derive()
        problems = self._problems()
        if problems:
            raise ConfigError("\n".join(problems))

    def _derive(self) -> None:
        """Fills values that follow from others."""
        if self.expert_tensor_parallel_size is None:
            self.expert_tensor_parallel_size = self.tensor_model_parallel_size
        if self.autocast_dtype is None:
            self.autocast_dtype = self.params_dtype
        if self.microbatch_group_size_per_vp_stage is None:
            self.microbatch_group_size_per_vp_stage = self.pipeline_model_parallel_size

    def _problems(self) -> list[str]:
        """One sentence for every broken rule: what was set, and what to set instead."""
        tp, pp, ep = (
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.expert_model_parallel_size,
        )
        deferral = self.defer_embedding_wgrad_compute
        warmup_overlap = self.overlap_p2p_comm_warmup_flush
        rules = [
            (
                self.sequence_parallel and tp <= 1,
                f"sequence_parallel: tensor_model_parallel_size is {tp}; raise it above 1 or leave "
                "sequence_parallel off",
            ),
            (
                pp > 1 and self.pipeline_dtype is None,
                f"pipeline_dtype: unset with pipeline_model_parallel_size {pp}; set it to params_dtype",
            ),
            (
                ep > 1 and tp > 1 and not self.sequence_parallel,
                f"expert_model_parallel_size {ep} with tensor_model_parallel_size {tp}: set "
                "sequence_parallel=True",
            ),
            (
                deferral and pp <= 1,
                f"defer_embedding_wgrad_compute: pipeline_model_parallel_size is {pp}; it must be above 1",
            ),
            (
                deferral and not self.gradient_accumulation_fusion,
                "defer_embedding_wgrad_compute: set gradient_accumulation_fusion=True as well",
            ),
            (
                deferral and self.wgrad_deferral_limit < 0,
                f"wgrad_deferral_limit: {self.wgrad_deferral_limit} is negative; 0 means no limit",
            ),
            (
                self.tp_comm_chunks < 1,
                f"tp_comm_chunks: {self.tp_comm_chunks} is not positive; 1 leaves matmuls whole",
            ),
            (
                warmup_overlap and (not self.overlap_p2p_comm or self.batch_p2p_comm),
                "overlap_p2p_comm_warmup_flush: set overlap_p2p_comm=True and batch_p2p_comm=False as well",
            ),
        ]
        return [problem for broken, problem in rules if broken]
