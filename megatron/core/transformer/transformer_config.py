"""Hyper-parameters of a transformer, and what follows from them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F

from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import init_method_normal, scaled_init_method_normal

ROPE_TYPES = ("rope", "yarn")
RECOMPUTE_MODULES = ("core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe")
ATTENTION_LAYOUTS = ("SBH", "BSH")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")

# Field -> what it would switch on. The command line takes some of their flags and says that they do nothing;
# a config of one's own must not be silent about it.
UNBUILT = {
    "fp8": "fp8 arithmetic",
    "fp8_param": "weights in fp8",
    "fp8_dot_product_attention": "attention in fp8",
    "fp8_multi_head_attention": "attention in fp8",
    "cpu_offloading": "keeping activations on the host",
    "enable_cuda_graph": "capturing layers as graphs",
    "external_cuda_graph": "capturing layers as graphs",
    "flash_decode": "a kernel for decoding",
    "heterogeneous_block_specs": "layers of different kinds",
}

# (condition under which the rule is broken, sentence)
Rules = Iterable[tuple[object, str]]


@dataclass
class TransformerConfig(ModelParallelConfig):
    """All hyper-parameters of a model.  Unset values are derived, then all rules are checked at once.

    Raises:
        ConfigError: settings that contradict each other; the message lists every one with a way out.
        NotBuiltYetError: a setting whose code does not exist: the model would not be what was asked for.
    """

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

    def __post_init__(self) -> None:
        refuse_unbuilt(self)
        super().__post_init__()

    def _derive(self) -> None:
        super()._derive()
        self._derive_shapes()
        self._derive_initialisers()
        if self.apply_query_key_layer_scaling:
            # Scores divided by the layer number are multiplied back inside the softmax, which overflows fp16.
            self.attention_softmax_in_fp32 = True
        if self.recompute_modules is None:
            self.recompute_modules = ["core_attn"]
        if self.moe_layer_recompute and self.recompute_granularity != "full":
            self.recompute_granularity = "selective"
            if "moe" not in self.recompute_modules:
                self.recompute_modules = [*self.recompute_modules, "moe"]
        if self.window_size is not None:
            # Whether it has two entries is for the rules to say.
            self.window_size = tuple(self.window_size)  # pyright: ignore[reportAttributeAccessIssue]
        self._derive_moe()

    def recomputes(self, module: str) -> bool:
        """Whether selective recompute covers ``module``, one of :data:`RECOMPUTE_MODULES`."""
        return self.recompute_granularity == "selective" and module in (self.recompute_modules or ())

    def _derive_shapes(self) -> None:
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = 4 * self.hidden_size
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.kv_channels is None and self.num_attention_heads > 0:
            if self.hidden_size % self.num_attention_heads:
                raise ConfigError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}: change one of them, or set kv_channels to the width "
                    "of a head"
                )
            self.kv_channels = self.hidden_size // self.num_attention_heads

    def _derive_initialisers(self) -> None:
        if self.init_method is None:
            self.init_method = init_method_normal(self.init_method_std)
        if self.output_layer_init_method is None:
            self.output_layer_init_method = scaled_init_method_normal(
                self.init_method_std, max(self.num_layers, 1), multiplier=2.0
            )

    def _derive_moe(self) -> None:
        if self.num_moe_experts is not None and self.moe_ffn_hidden_size is None:
            self.moe_ffn_hidden_size = self.ffn_hidden_size
        if self.moe_expert_capacity_factor is not None and self.moe_expert_capacity_factor < 0:
            self.moe_expert_capacity_factor = None
        if self.moe_router_topk_limited_devices is not None and self.moe_router_group_topk is None:
            self.moe_router_group_topk = self.moe_router_topk_limited_devices
            self.moe_router_num_groups = self.expert_model_parallel_size

    def _problems(self) -> list[str]:
        return super()._problems() + transformer_problems(self)


@dataclass
class MLATransformerConfig(TransformerConfig):
    """Adds the sizes of multi-head latent attention (DeepSeek-V2, section 2.1)."""

    multi_latent_attention: bool = True  # DeepSeek style low-rank attention
    q_lora_rank: int | None = 512  # None: queries are not compressed; rank of the query compression
    kv_lora_rank: int = 512  # rank of the key/value compression
    qk_head_dim: int = 128  # non-rotary head width
    qk_pos_emb_head_dim: int = 64  # rotary head width
    v_head_dim: int = 128  # value head width
    normalization: str = "RMSNorm"  # LayerNorm or RMSNorm
    rope_type: str = "yarn"  # 'rope' or 'yarn'
    rotary_base: float = 10000  # rotary base frequency
    rotary_percent: float = 1.0  # share of head width that is rotated
    rotary_scaling_factor: float = 40  # YaRN factor
    max_position_embeddings: int = 4096  # YaRN original context length
    beta_fast: float = 32  # YaRN fast bound
    beta_slow: float = 1  # YaRN slow bound
    mscale: float = 0.707  # YaRN magnitude scale
    mscale_all_dim: float = 0.707  # YaRN magnitude scale over all dims


def moe_layer_pattern(config: TransformerConfig) -> list[bool]:
    """Which layers have experts, over the whole model.

    An integer frequency f means layers 0, f, 2f ..., counted from 0; a list says it layer by layer.
    """
    if not config.num_moe_experts:
        return [False] * config.num_layers
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [bool(chosen) for chosen in frequency]


# ---- The rules: small functions that return a sentence per broken rule


def refuse_unbuilt(config: TransformerConfig) -> None:
    """Raises NotBuiltYetError for the first field that asks for what does not exist."""
    for field, feature in UNBUILT.items():
        value = getattr(config, field)
        if value:
            raise NotBuiltYetError(feature, f"{field}={value!r}", f"Leave {field} out.")


def transformer_problems(config: TransformerConfig) -> list[str]:
    """Every broken rule of ``config``: what was set, and what to set instead."""
    groups = (_precision, _attention, _scales, _mlp, _recompute, _pipeline_layout, _context_parallel)
    groups += (_further_tokens, _moe)
    return [sentence for group in groups for broken, sentence in group(config) if broken]


def _precision(c: TransformerConfig) -> Rules:
    yield c.fp16 and c.bf16, "fp16 and bf16 are both set: keep one"
    yield (
        c.normalization not in NORMALIZATIONS,
        f"normalization: {c.normalization!r} is not one of {', '.join(NORMALIZATIONS)}",
    )


def _attention(c: TransformerConfig) -> Rules:
    heads, groups, tp = c.num_attention_heads, c.num_query_groups, c.tensor_model_parallel_size
    if heads and groups is not None:
        yield heads % tp, f"num_attention_heads {heads} is not divisible by tensor_model_parallel_size {tp}"
        yield (
            groups < 1 or heads % groups,
            f"num_query_groups {groups} does not divide num_attention_heads {heads}: use one of "
            f"{_divisors(heads)}",
        )
        yield groups % tp, f"num_query_groups {groups} is not divisible by tensor_model_parallel_size {tp}"
    yield (
        c.attention_layout not in ATTENTION_LAYOUTS,
        f"attention_layout: {c.attention_layout!r} is not one of {', '.join(ATTENTION_LAYOUTS)}",
    )
    yield (
        c.window_size is not None and (len(c.window_size) != 2 or any(side < -1 for side in c.window_size)),
        f"window_size: {c.window_size} must be (left, right) with numbers of tokens >= 0, or -1 for no limit",
    )
    yield from _latent_attention(c)


def _scales(c: TransformerConfig) -> Rules:
    factor = c.embedding_multiplier_scale
    yield factor <= 0, f"embedding_multiplier_scale: {factor}; it must be positive, 1 changes nothing"
    for name in ("output_multiplier_scale", "attn_logit_softcapping", "output_logit_softcapping"):
        number = getattr(c, name)
        yield number is not None and number <= 0, f"{name}: {number}; it must be positive, or None for none"


def _latent_attention(c: TransformerConfig) -> Rules:
    if not c.multi_latent_attention:
        return
    yield (
        c.rotary_interleaved,
        "rotary_interleaved: multi_latent_attention has its own order of rotary pairs; leave it off",
    )
    yield (
        c.apply_rope_fusion,
        "apply_rope_fusion: not available with multi_latent_attention; leave it off",
    )
    if not isinstance(c, MLATransformerConfig):
        yield True, "multi_latent_attention: its sizes are fields of MLATransformerConfig; use that class"
        return
    yield c.rope_type not in ROPE_TYPES, f"rope_type: {c.rope_type!r} is not one of {', '.join(ROPE_TYPES)}"
    yield (
        c.qk_pos_emb_head_dim < 2 or c.qk_pos_emb_head_dim % 2,
        f"qk_pos_emb_head_dim {c.qk_pos_emb_head_dim}: rotated channels come in pairs; use an even number",
    )
    for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "v_head_dim"):
        size = getattr(c, name)
        yield size is not None and size < 1, f"{name} {size}: it must be at least 1"
    yield (
        c.rotary_scaling_factor <= 0,
        f"rotary_scaling_factor {c.rotary_scaling_factor}: it must be positive; 1 scales nothing",
    )


def _mlp(c: TransformerConfig) -> Rules:
    fused_activations = (F.gelu, F.silu)
    name = getattr(c.activation_func, "__name__", c.activation_func)
    yield (
        c.bias_activation_fusion and c.activation_func not in fused_activations,
        f"bias_activation_fusion: only for gelu and silu, activation_func is {name}; leave it off",
    )
    yield (
        c.bias_activation_fusion
        and c.activation_func is F.gelu
        and not c.gated_linear_unit
        and not c.add_bias_linear,
        "bias_activation_fusion: gelu without linear bias has no bias to fuse; leave it off",
    )
    yield (
        c.glu_gate_last and not c.gated_linear_unit,
        "glu_gate_last: set gated_linear_unit=True as well",
    )


def _recompute(c: TransformerConfig) -> Rules:
    granularity, method, layers = c.recompute_granularity, c.recompute_method, c.recompute_num_layers
    yield (
        granularity not in (None, "full", "selective"),
        f"recompute_granularity: {granularity!r} is not full or selective",
    )
    yield (
        granularity == "full" and method not in ("block", "uniform"),
        f"recompute_method: {method!r} with recompute_granularity full; set it to uniform or block",
    )
    yield (
        granularity == "full" and layers is None,
        "recompute_num_layers: unset with recompute_granularity full; set it to 1 or more",
    )
    yield (
        granularity == "full" and layers is not None and layers < 1,
        f"recompute_num_layers: {layers}; set it to 1 or more",
    )
    yield (
        granularity == "selective" and layers is not None,
        f"recompute_num_layers: {layers} has no meaning with recompute_granularity selective; leave it unset",
    )
    yield (
        c.distribute_saved_activations and c.sequence_parallel,
        "distribute_saved_activations: sequence_parallel splits them already; leave one of the two off",
    )
    modules = c.recompute_modules or []
    unknown = [name for name in modules if name not in RECOMPUTE_MODULES]
    yield unknown, f"recompute_modules: {', '.join(unknown)} not among {', '.join(RECOMPUTE_MODULES)}"
    if granularity == "selective":
        yield (
            "moe_act" in modules and not c.moe_grouped_gemm,
            "recompute_modules moe_act: set moe_grouped_gemm=True as well",
        )
        yield (
            "mla_up_proj" in modules and not c.multi_latent_attention,
            "recompute_modules mla_up_proj: this model has no multi_latent_attention; leave it out",
        )
    yield (
        c.moe_layer_recompute and granularity == "full",
        "moe_layer_recompute: recompute_granularity full covers the experts; leave it off",
    )


def _pipeline_layout(c: TransformerConfig) -> Rules:
    uneven = (
        c.num_layers_in_first_pipeline_stage is not None or c.num_layers_in_last_pipeline_stage is not None
    )
    yield (
        uneven and (c.account_for_embedding_in_pipeline_split or c.account_for_loss_in_pipeline_split),
        "num_layers_in_first/last_pipeline_stage: not together with "
        "account_for_embedding/loss_in_pipeline_split",
    )
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        count = getattr(c, name)
        yield count is not None and count <= 0, f"{name}: {count}; it must be at least 1"


def _context_parallel(c: TransformerConfig) -> Rules:
    kinds = c.cp_comm_type
    yield (
        isinstance(kinds, list) and c.context_parallel_size > 1 and len(kinds) != c.num_layers,
        f"cp_comm_type: {len(kinds) if isinstance(kinds, list) else 1} words for {c.num_layers} layers; "
        "give one word, or one per layer",
    )


def _further_tokens(c: TransformerConfig) -> Rules:
    depths, factor = c.mtp_num_layers or 0, c.mtp_loss_scaling_factor
    yield depths < 0, f"mtp_num_layers: {depths}; it must be at least 1, or None"
    yield depths > 0 and factor is None, "mtp_loss_scaling_factor: needed with mtp_num_layers; set it to 0.1"
    yield factor is not None and factor < 0, f"mtp_loss_scaling_factor: {factor}; it must be at least 0"


def _moe(c: TransformerConfig) -> Rules:
    experts = c.num_moe_experts
    if experts is None:
        yield (
            c.expert_model_parallel_size > 1,
            f"expert_model_parallel_size {c.expert_model_parallel_size}: set num_moe_experts as well",
        )
        return
    yield experts <= 0, f"num_moe_experts: {experts}; it must be positive, or None for a dense model"
    yield c.add_bias_linear, "num_moe_experts: experts have no biases; set add_bias_linear=False"
    yield from _moe_parts(c, experts)
    yield from _moe_capacity(c)
    yield from _moe_dispatch(c)
    yield from _moe_routing(c, experts)


def _moe_parts(c: TransformerConfig, experts: int) -> Rules:
    """How experts divide among ranks and layers."""
    ep, etp, width = (
        c.expert_model_parallel_size,
        c.expert_tensor_parallel_size or 1,
        c.moe_ffn_hidden_size or 0,
    )
    yield experts % ep, f"num_moe_experts {experts} is not divisible by expert_model_parallel_size {ep}"
    yield width % etp, f"moe_ffn_hidden_size {width} is not divisible by expert_tensor_parallel_size {etp}"
    yield (
        (c.moe_shared_expert_intermediate_size or 0) % c.tensor_model_parallel_size,
        f"moe_shared_expert_intermediate_size {c.moe_shared_expert_intermediate_size} is not divisible by "
        f"tensor_model_parallel_size {c.tensor_model_parallel_size}",
    )
    frequency = c.moe_layer_freq
    yield (
        isinstance(frequency, int) and frequency < 1,
        f"moe_layer_freq: {frequency}; set it to 1 or more, or to a list of 0 and 1 for each layer",
    )
    yield (
        not isinstance(frequency, int) and len(frequency) != c.num_layers,
        f"moe_layer_freq: {frequency} for {c.num_layers} layers; give 0 or 1 for each layer",
    )
    yield (
        not isinstance(frequency, int) and any(chosen not in (0, 1) for chosen in frequency),
        f"moe_layer_freq: {frequency} has other entries than 0 and 1",
    )
    yield (
        c.moe_apply_probs_on_input and c.moe_router_topk != 1,
        f"moe_apply_probs_on_input: moe_router_topk is {c.moe_router_topk}; it goes with 1",
    )
    yield (
        c.moe_shared_expert_gate and c.moe_shared_expert_intermediate_size is None,
        "moe_shared_expert_gate: set moe_shared_expert_intermediate_size as well",
    )


def _moe_capacity(c: TransformerConfig) -> Rules:
    balancing = ("aux_loss", "seq_aux_loss", "none")
    capped = c.moe_expert_capacity_factor is not None
    yield (
        capped and c.moe_router_load_balancing_type not in balancing,
        f"moe_expert_capacity_factor: needs moe_router_load_balancing_type {', '.join(balancing)}, "
        f"not {c.moe_router_load_balancing_type}",
    )
    yield (
        c.moe_pad_expert_input_to_capacity and not capped,
        "moe_pad_expert_input_to_capacity: set moe_expert_capacity_factor as well",
    )


def _moe_dispatch(c: TransformerConfig) -> Rules:
    dispatcher = c.moe_token_dispatcher_type
    yield (
        c.moe_shared_expert_overlap and dispatcher == "allgather",
        "moe_shared_expert_overlap: moe_token_dispatcher_type is allgather; use alltoall",
    )
    yield (
        dispatcher == "allgather" and c.variable_seq_lengths,
        "variable_seq_lengths: not with moe_token_dispatcher_type allgather; use alltoall",
    )


def _moe_routing(c: TransformerConfig, experts: int) -> Rules:
    yield (
        c.moe_router_enable_expert_bias and c.moe_router_score_function != "sigmoid",
        "moe_router_enable_expert_bias: set moe_router_score_function='sigmoid'",
    )
    kind, topk = c.moe_router_load_balancing_type, c.moe_router_topk
    yield (
        topk == 1
        and c.moe_router_score_function == "softmax"
        and not c.moe_router_pre_softmax
        and kind in ("aux_loss", "seq_aux_loss", "none"),
        "moe_router_topk 1: a softmax over one score is always 1; set moe_router_pre_softmax=True",
    )
    yield (
        experts > 0 and not 1 <= topk <= experts,
        f"moe_router_topk {topk}: choose 1 to {experts} experts a token",
    )
    yield (
        kind == "sinkhorn" and c.moe_aux_loss_coeff,
        "moe_aux_loss_coeff: sinkhorn routing is even by itself; set it to 0",
    )
    yield from _moe_groups(c, experts)


def _moe_groups(c: TransformerConfig, experts: int) -> Rules:
    """Groups of experts to which a token's choice is limited."""
    groups, kept, topk = c.moe_router_num_groups, c.moe_router_group_topk, c.moe_router_topk
    greedy = c.moe_router_load_balancing_type == "group_limited_greedy"
    if greedy:
        groups = groups or c.expert_model_parallel_size
        yield not kept, "moe_router_load_balancing_type group_limited_greedy: set moe_router_group_topk"
    yield kept is not None and not groups, "moe_router_group_topk: set moe_router_num_groups as well"
    if not groups:
        return
    yield experts % groups, f"num_moe_experts {experts} is not divisible by moe_router_num_groups {groups}"
    if not kept:
        return
    yield kept > groups, f"moe_router_group_topk {kept} exceeds moe_router_num_groups {groups}"
    yield (
        topk > kept * (experts // groups),
        f"moe_router_topk {topk}: {kept} groups of {experts // groups} experts have fewer",
    )
    yield (
        not greedy and topk < kept <= groups,
        f"moe_router_group_topk {kept} exceeds moe_router_topk {topk}: a token cannot use more groups",
    )


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
