"""Hyper-parameters of a transformer: the fields of its config, and what they say together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.enums import AttnBackend


@dataclass
class TransformerFields(ModelParallelConfig):
    """The fields alone: :class:`TransformerConfig` derives what is unset, and checks."""

    num_layers: int = 0  # depth of the (encoder or decoder-only) transformer; also fills encoder-num-layers
    mtp_num_layers: int | None = None  # number of multi-token-prediction layers
    mtp_loss_scaling_factor: float | None = None  # weight of the averaged MTP loss
    # predict further tokens from the output of the final norm, as Megatron does, or from its input
    mtp_after_norm: bool = True
    num_layers_in_first_pipeline_stage: int | None = None  # own depth of the first stage (decoder)
    num_layers_in_last_pipeline_stage: int | None = None  # own depth of the last stage (decoder)
    account_for_embedding_in_pipeline_split: bool = False  # count the embedding as one layer when splitting
    account_for_loss_in_pipeline_split: bool = False  # count the loss as one layer when splitting
    hidden_size: int = 0  # model width
    num_attention_heads: int = 0  # number of query heads
    # pick the attention implementation (auto/flash/fused/unfused/local)
    attention_backend: AttnBackend = AttnBackend.auto
    softmax_scale: float | None = None  # fixed softmax scale instead of 1/sqrt(d)
    num_query_groups: int | None = None  # number of key/value heads when GQA is on
    ffn_hidden_size: int | None = None  # MLP inner width
    kv_channels: int | None = None  # per-head width
    hidden_dropout: float = 0.1  # dropout on hidden states and embeddings
    attention_dropout: float = 0.1  # dropout on attention probabilities
    fp32_residual_connection: bool = False  # keep the residual stream in fp32
    # take the residual after the norm (original BERT order)
    apply_residual_connection_post_layernorm: bool = False
    layernorm_epsilon: float = 1e-05  # epsilon of norms
    layernorm_zero_centered_gamma: bool = False  # norm weight stored as gamma-1
    add_bias_linear: bool = True  # bias in linear layers
    add_qkv_bias: bool = False  # bias on the QKV projection only
    gated_linear_unit: bool = False  # gated MLP (SwiGLU/GEGLU)
    activation_func: Callable[..., Any] = F.gelu  # MLP activation
    activation_func_fp8_input_store: bool = False  # keep activation input in fp8 for backward
    num_moe_experts: int | None = None  # experts per MoE layer, None for a dense model
    rotary_interleaved: bool = False  # rotate even/odd pairs instead of the two halves
    window_size: tuple[int, int] | None = None  # (left, right) sliding window
    normalization: str = "LayerNorm"  # LayerNorm or RMSNorm
    qk_layernorm: bool = False  # norm on queries and keys
    test_mode: bool = False  # run internal consistency checks during training
    calculate_per_token_loss: bool = False  # divide gradients by the global count of unmasked tokens
    multi_latent_attention: bool = False  # DeepSeek style low-rank attention
    init_method: Callable[..., Any] | None = None  # weight initialiser; None becomes normal(init_method_std)
    # initialiser of linear_proj and fc2; None becomes scaled normal
    output_layer_init_method: Callable[..., Any] | None = None
    init_method_std: float = 0.02  # std of the normal initialiser
    init_model_with_meta_device: bool = False  # build the model on the meta device
    apply_query_key_layer_scaling: bool = False  # divide QK by layer number, undo in softmax
    attention_softmax_in_fp32: bool = True  # softmax in fp32 (forced by query-key layer scaling)
    disable_bf16_reduced_precision_matmul: bool = False  # cuBLAS switch for bf16 accumulation
    bias_activation_fusion: bool = False  # fuse bias and activation
    masked_softmax_fusion: bool = False  # fuse scale, mask, softmax
    persist_layer_norm: bool = False  # persistent norm kernel
    memory_efficient_layer_norm: bool = False  # recompute norm input in backward
    bias_dropout_fusion: bool = False  # fuse bias, dropout, residual add
    apply_rope_fusion: bool = False  # fused rotary kernel
    recompute_granularity: str | None = None  # full layer or selective recompute
    recompute_method: str | None = None  # uniform or block layer choice for full recompute
    recompute_num_layers: int | None = None  # layers per unit (uniform) or per stage (block)
    distribute_saved_activations: bool | None = None  # spread the recompute inputs over the TP group
    recompute_modules: list[str] | None = None  # which sub-modules selective recompute covers
    fp8: str | None = None  # TE fp8 mode: e4m3 or hybrid
    fp8_recipe: str | None = "delayed"  # fp8 scaling recipe
    fp8_param: bool = False  # fp8 weights
    fp8_margin: int = 0  # fp8 margin
    fp8_interval: int = 1  # unused
    fp8_amax_history_len: int = 1  # fp8 history
    fp8_amax_compute_algo: str = "most_recent"  # fp8 history rule
    fp8_wgrad: bool = True  # weight gradients in fp8
    fp8_dot_product_attention: bool = False  # fp8 attention
    fp8_multi_head_attention: bool = False  # fp8 attention with outer projections
    tp_only_amax_red: bool = False  # fp8 statistics only over TP
    first_last_layers_bf16: bool = False  # keep edge layers in bf16 under fp8
    num_layers_at_start_in_bf16: int = 1  # edge layer count
    num_layers_at_end_in_bf16: int = 1  # edge layer count
    moe_shared_expert_intermediate_size: int | None = None  # total width of shared experts
    moe_shared_expert_overlap: bool = False  # overlap shared experts with dispatch
    moe_layer_freq: int | list[int] = 1  # every N-th layer is MoE, or a 0/1 pattern expression
    moe_ffn_hidden_size: int | None = None  # expert inner width
    moe_router_load_balancing_type: str = "aux_loss"  # aux_loss, seq_aux_loss, sinkhorn, none
    moe_router_topk: int = 2  # experts per token
    moe_router_topk_limited_devices: int | None = None  # deprecated form of group-limited routing
    moe_router_num_groups: int | None = None  # expert groups for limited routing
    moe_router_group_topk: int | None = None  # groups kept per token
    moe_router_pre_softmax: bool = False  # softmax before the top-k
    moe_router_topk_scaling_factor: float | None = None  # multiplier on routing probabilities
    moe_router_score_function: str = "softmax"  # softmax or sigmoid scores
    moe_router_dtype: str | None = None  # routing precision fp32/fp64
    moe_router_enable_expert_bias: bool = False  # bias-based balancing without aux loss
    moe_router_force_load_balancing: bool = False  # experts in turn, whatever the scores say (benchmarks)
    norm_topk_prob: bool = False  # weights of a token's experts divided by their sum
    seq_aux: bool = False  # balancing losses over each sequence, with types none and group_limited_greedy
    moe_device_level_aux_loss_coeff: float = 0.0  # loss on the load of groups, with group_limited_greedy
    moe_comm_aux_loss_coeff: float = 0.0  # loss on the traffic to groups, with group_limited_greedy
    log_moe_balance: bool = False  # count the loads of experts
    moe_router_bias_update_rate: float = 0.001  # step of the expert bias
    moe_grouped_gemm: bool = False  # batch the experts' GEMMs
    moe_use_legacy_grouped_gemm: bool = False  # older grouped GEMM class
    moe_aux_loss_coeff: float = 0  # weight of the balancing loss
    moe_z_loss_coeff: float | None = None  # weight of the router z-loss
    moe_input_jitter_eps: float | None = None  # multiplicative input noise for the router
    moe_token_dropping: bool = False  # unused
    moe_token_dispatcher_type: str = "allgather"  # allgather, alltoall, flex, alltoall_seq
    moe_enable_deepep: bool = False  # DeepEP kernels for the flex dispatcher
    moe_per_layer_logging: bool = False  # write MoE losses per layer to TensorBoard
    moe_expert_capacity_factor: float | None = None  # capacity per expert (unset = dropless)
    moe_pad_expert_input_to_capacity: bool = False  # pad every expert to capacity
    moe_token_drop_policy: str = "probs"  # drop by probability or position
    moe_layer_recompute: bool = False  # recompute the whole MoE layer
    moe_permute_fusion: bool = False  # TE fused token permutation
    moe_apply_probs_on_input: bool = False  # multiply by probability before the expert (top-1 only)
    cp_comm_type: str | list[str] | None = None  # CP exchange scheme, one word or one per layer
    enable_cuda_graph: bool = False  # capture layers as CUDA graphs
    cuda_graph_use_single_mempool: bool = False  # CUDA graph detail
    cuda_graph_retain_backward_graph: bool = False  # CUDA graph detail
    cuda_graph_warmup_steps: int = 3  # CUDA graph warmup
    external_cuda_graph: bool = False  # user-captured CUDA graphs
    cuda_graph_scope: str = "full"  # what to capture
    # clone after the sequence scatter of embeddings so the full tensor is freed
    clone_scatter_output_in_embedding: bool = True
    disable_parameter_transpose_cache: bool = False  # TE weight transpose cache off
    config_logger_dir: str = ""  # dump configs as JSON into this directory
    flash_decode: bool = False  # decode kernel switch
    use_te_rng_tracker: bool = False  # TE random tracker
    inference_rng_tracker: bool = False  # no-op random tracker for inference
    mrope_section: list[int] | None = None  # channel split for multimodal RoPE
    is_hybrid_model: bool = False  # Mamba hybrid
    mamba_state_dim: int = 128  # Mamba
    mamba_head_dim: int = 64  # Mamba
    mamba_num_groups: int = 8  # Mamba
    heterogeneous_block_specs: bool = False  # per-layer specs (out of scope)

    # Fields of this package
    moe_shared_expert_gate: bool = False  # multiply shared experts' output by a sigmoid of the input
    attention_layout: str = "SBH"  # layout of the operands of fused attention: SBH or BSH
    glu_gate_last: bool = False  # gated MLP multiplies by the activated second half instead of the first
    post_norm: bool = False  # two more norms per layer: of the attention's output and of the MLP's
    embedding_multiplier_scale: float = 1.0  # factor of the word embedding's output
    output_multiplier_scale: float | None = None  # factor of the logits
    attn_logit_softcapping: float | None = None  # c: attention scores x become c * tanh(x / c)
    output_logit_softcapping: float | None = None  # c: logits x become c * tanh(x / c)

    def recomputes(self, module: str) -> bool:
        """Whether selective recompute covers ``module``."""
        return self.recompute_granularity == "selective" and module in (self.recompute_modules or ())


def moe_layer_pattern(config: TransformerFields) -> list[bool]:
    """Which layers have experts, over the whole model.

    An integer frequency f means layers 0, f, 2f ..., counted from 0; a list says it layer by layer.
    """
    if not config.num_moe_experts:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [bool(chosen) for chosen in frequency]
