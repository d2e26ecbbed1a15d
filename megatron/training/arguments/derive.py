"""Values that follow from other values.

Each step takes the namespace and the flags that were given, fills attributes in, and returns the lines that
rank 0 prints about it.  A step never fails: on values that make no sense it does nothing, and a rule reports
them.  Running all steps twice changes nothing.
"""

import os
from argparse import Namespace
from collections.abc import Callable, Collection

Derivation = Callable[[Namespace, Collection[str]], list[str]]
CLAMP = "MEGATRON_CLAMP_PARALLEL"
# Words of --cp-comm-type by those of --context-parallel-algo.
EXCHANGES = {"ulysses_cp_algo": "a2a", "megatron_cp_algo": "p2p", "hybrid_cp_algo": "a2a+p2p"}


def clamp_sizes(args: Namespace, given: Collection[str]) -> list[str]:
    """With MEGATRON_CLAMP_PARALLEL=1, sizes larger than the world shrink to it, as they did in 2023."""
    if os.environ.get(CLAMP) != "1":
        return []
    notes = []
    world = args.world_size
    for name, limit in (
        ("tensor", lambda: world),
        ("pipeline", lambda: world // args.tensor_model_parallel_size),
    ):
        dest = f"{name}_model_parallel_size"
        asked = getattr(args, dest)
        if asked > max(1, limit()):
            setattr(args, dest, max(1, limit()))
            notes.append(
                f"WARNING: {CLAMP}=1: --{dest.replace('_', '-')} {asked} is reduced to "
                f"{getattr(args, dest)}, because the world has {world} ranks"
            )
    return notes


def context_scheme(args: Namespace, given: Collection[str]) -> list[str]:
    """The older names of the context-parallel exchange, and of its two levels."""
    if args.context_parallel_algo in EXCHANGES and "--cp-comm-type" not in given:
        args.cp_comm_type = [EXCHANGES[args.context_parallel_algo]]
    inner, size = args.ulysses_degree_in_cp, args.context_parallel_size
    if inner and inner > 0 and size % inner == 0 and not args.hierarchical_context_parallel_sizes:
        args.hierarchical_context_parallel_sizes = [inner, size // inner]
    return []


def virtual_stages(args: Namespace, given: Collection[str]) -> list[str]:
    """Virtual stages per pipeline rank, given as such or as layers per virtual stage."""
    stages, layers_each = (
        args.num_virtual_stages_per_pipeline_rank,
        args.num_layers_per_virtual_pipeline_stage,
    )
    layers = args.num_layers or args.encoder_num_layers
    size = None
    if stages:
        size = stages
    elif layers_each and layers_each > 0 and layers and args.pipeline_model_parallel_size > 0:
        slots = (
            layers + args.account_for_embedding_in_pipeline_split + args.account_for_loss_in_pipeline_split
        )
        size = max(1, slots // args.pipeline_model_parallel_size // layers_each)
    args.virtual_pipeline_model_parallel_size = size
    if size is not None:
        return [f"Number of virtual stages per pipeline stage: {size}"]
    args.overlap_p2p_comm = False
    args.align_param_gather = False
    return []


def experts(args: Namespace, given: Collection[str]) -> list[str]:
    """Other spellings of where experts are, how many are shared, and which layers have them."""
    if args.num_experts == 0:
        args.num_experts = None
    if args.moe_tp_extend_ep:
        args.expert_model_parallel_size *= args.tensor_model_parallel_size
        args.expert_tensor_parallel_size = 1
        args.moe_tp_extend_ep = False
    if args.router_gating_in_fp32:
        args.moe_router_dtype = args.moe_router_dtype or "fp32"
    width = args.moe_ffn_hidden_size or args.ffn_hidden_size
    if args.n_shared_experts and args.moe_shared_expert_intermediate_size is None and width:
        args.moe_shared_expert_intermediate_size = args.n_shared_experts * width
    _dense_first_layers(args)
    return []


def _dense_first_layers(args: Namespace) -> None:
    """-1 means every layer, and --first-k-dense-replace that the first ones have no experts."""
    if args.moe_layer_freq == -1:
        args.moe_layer_freq = 1
    dense, frequency, layers = args.first_k_dense_replace, args.moe_layer_freq, args.num_layers
    if dense is None or not isinstance(frequency, int) or frequency < 1 or not layers or layers < 1:
        return
    if dense < 1:
        args.moe_layer_freq = 1
    elif dense < layers:
        args.moe_layer_freq = [int(layer >= dense and layer % frequency == 0) for layer in range(layers)]


def parallel_layout(args: Namespace, given: Collection[str]) -> list[str]:
    """Sizes of the groups, and what a single tensor rank switches off."""
    tp, pp, cp = (
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.context_parallel_size,
    )
    args.transformer_pipeline_model_parallel_size = pp
    args.data_parallel_size = max(1, args.world_size // max(1, tp * pp * cp))
    if args.expert_tensor_parallel_size is None:
        args.expert_tensor_parallel_size = tp
    args.variable_seq_lengths = False
    notes = [
        f"using world size: {args.world_size}, data-parallel size: {args.data_parallel_size}, "
        f"context-parallel size: {cp}, "
        f"hierarchical context-parallel sizes: {args.hierarchical_context_parallel_sizes}"
        f"tensor-model-parallel size: {tp}, "
        f"encoder-tensor-model-parallel size: {args.encoder_tensor_model_parallel_size}, "
        f"pipeline-model-parallel size: {pp}, "
        f"encoder-pipeline-model-parallel size: {args.encoder_pipeline_model_parallel_size}"
    ]
    if tp == 1 and args.sequence_parallel:
        args.sequence_parallel = False
        notes.append("WARNING: --sequence-parallel is switched off: the tensor parallel size is 1")
    return notes


def checkpoint_format(args: Namespace, given: Collection[str]) -> list[str]:
    """An unset format means torch for now."""
    notes = []
    if "--ckpt-format" not in given and args.ckpt_format != "torch":
        args.ckpt_format = "torch"
        if args.save or args.load or args.pretrained_checkpoint:
            notes.append("notice: --ckpt-format is not given; checkpoints are read and written as torch")
    args.use_dist_ckpt = args.ckpt_format != "torch"
    return notes


def batch_size(args: Namespace, given: Collection[str]) -> list[str]:
    """The global batch is one micro-batch per data-parallel rank unless given."""
    ramp = args.rampup_batch_size
    if ramp and all(str(word).isdigit() for word in ramp):
        args.rampup_batch_size = [int(word) for word in ramp]
    if args.global_batch_size is not None or not args.micro_batch_size:
        return []
    args.global_batch_size = args.micro_batch_size * args.data_parallel_size
    return [f"setting global batch size to {args.global_batch_size}"]


def depth_and_length(args: Namespace, given: Collection[str]) -> list[str]:
    """--num-layers and --encoder-num-layers name one thing, so do --seq-length and --encoder-seq-length."""
    for name, twin in (("num_layers", "encoder_num_layers"), ("seq_length", "encoder_seq_length")):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args, twin))
        elif getattr(args, twin) is None:
            setattr(args, twin, getattr(args, name))
    return []


def widths(args: Namespace, given: Collection[str]) -> list[str]:
    """Width of the MLP and of a head."""
    hidden, heads = args.hidden_size, args.num_attention_heads
    from_checkpoint = args.ffn_hidden_size is not None and "--ffn-hidden-size" not in given
    if hidden and hidden > 0:
        if args.ffn_hidden_size is None and args.swiglu:
            # Two thirds of 4h keeps the parameter count of a plain MLP; rounded down to a multiple of 64.
            args.ffn_hidden_size = int((4 * hidden * 2 / 3) / 64) * 64
        elif args.ffn_hidden_size is None:
            args.ffn_hidden_size = 4 * hidden
        if args.kv_channels is None and heads and heads > 0 and hidden % heads == 0:
            args.kv_channels = hidden // heads
    return _x_model_width(args, from_checkpoint)


def _x_model_width(args: Namespace, from_checkpoint: bool) -> list[str]:
    """An x model's width counts both halves of its gated MLP; a checkpoint's counts one."""
    halved = getattr(args, "glu_gate_last", False)
    args.glu_gate_last = halved
    if not args.is_x_model or halved or not args.ffn_hidden_size:
        return []
    if from_checkpoint:
        args.glu_gate_last = True
    elif args.ffn_hidden_size % 2 == 0:
        args.ffn_hidden_size //= 2
        args.glu_gate_last = True
    return [f"--is-x-model: each half of the gated MLP is {args.ffn_hidden_size} wide"]


def positions(args: Namespace, given: Collection[str]) -> list[str]:
    """The old switch for rotary positions; their fused kernel is only asked for when there are any."""
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"
    if args.position_embedding_type != "rope":
        args.apply_rope_fusion = False
    return []


def activation(args: Namespace, given: Collection[str]) -> list[str]:
    """The GELU gates of MindSpeed win over --swiglu, which its scripts give beside them."""
    for flag, on in (("--geglu", args.geglu), ("--gelu-tanh", args.gelu_tanh)):
        if on and args.swiglu:
            args.swiglu = False
            return [f"WARNING: --swiglu gives way to {flag}"]
    return []


def layer_spec(args: Namespace, given: Collection[str]) -> list[str]:
    """The Grok layer of MindSpeed-LLM is the local one, which --post-norm gives its norms."""
    words = list(args.spec or ())
    if len(words) != 2 or words[0].rpartition(".")[2] != "grok_spec" or words[1] != "layer_spec":
        return []
    args.spec = ["local"]
    return [f"notice: --spec {' '.join(words)}: taken as --spec local; --post-norm adds the norms"]


def biases(args: Namespace, given: Collection[str]) -> list[str]:
    """What linear biases imply, and which activation has a fused kernel."""
    if args.add_bias_linear:
        args.add_qkv_bias = True
    if not args.add_bias_linear or args.squared_relu:
        args.bias_gelu_fusion = False
    return []


def attention(args: Namespace, given: Collection[str]) -> list[str]:
    """The sliding window, the operand layout, and the switch for fused attention."""
    from megatron.core.transformer.enums import AttnBackend

    notes = []
    reach, length = args.pre_tockens, args.seq_length
    covers_sequence = reach is None or length is None or reach >= length - 1
    if reach is None or reach >= 0:
        # Causal attention never looks ahead, whatever --next-tockens allows.
        args.window_size = None if covers_sequence else (reach, 0)
    args.attention_layout = "SBH" if args.shape_order == "SBH" else "BSH"
    backend = args.attention_backend
    if args.use_flash_attn and backend == AttnBackend.auto:
        args.attention_backend = AttnBackend.flash
    elif args.use_flash_attn and backend in (AttnBackend.unfused, AttnBackend.local):
        notes.append(f"WARNING: --use-flash-attn gives way to --attention-backend {backend.name}")
    if args.apply_query_key_layer_scaling:
        args.attention_softmax_in_fp32 = True
    return notes


def recompute(args: Namespace, given: Collection[str]) -> list[str]:
    """Short forms and old names of recompute."""
    if "--activations-checkpoint-method" in given:
        args.recompute_granularity = args.recompute_granularity or "full"
    if vars(args).pop("recompute_activations", False):
        args.recompute_granularity = "selective"
    if args.recompute_norm and args.recompute_granularity != "full":
        modules = args.recompute_modules
        if modules is None:
            modules = ["core_attn"] if args.recompute_granularity == "selective" else []
        args.recompute_granularity = "selective"
        args.recompute_modules = modules if "layernorm" in modules else [*modules, "layernorm"]
    if args.recompute_granularity == "full" and args.recompute_num_layers is None:
        args.recompute_num_layers = 1
    return []


def precision(args: Namespace, given: Collection[str]) -> list[str]:
    """Dtype of the parameters, of the gradient buffers and of the optimizer's state."""
    import torch

    notes = []
    args.params_dtype = torch.half if args.fp16 else torch.bfloat16 if args.bf16 else torch.float32
    words = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        setattr(args, name, words.get(getattr(args, name), getattr(args, name)))
    if args.fp16 and args.loss_scale is None and args.check_for_nan_in_loss_and_grad:
        args.check_for_nan_in_loss_and_grad = False
        notes.append("WARNING: NaN checks are off: dynamic loss scaling has to meet overflows")
    if args.bf16 and args.grad_reduce_in_bf16:
        args.accumulate_allreduce_grads_in_fp32 = False
    elif args.bf16 and not args.accumulate_allreduce_grads_in_fp32:
        args.accumulate_allreduce_grads_in_fp32 = True
        notes.append("accumulate and all-reduce gradients in fp32 for bfloat16 data type.")
    notes.append(f"using {args.params_dtype} for parameters ...")
    return notes


def weight_decay(args: Namespace, given: Collection[str]) -> list[str]:
    """A constant weight decay starts and ends at the same value."""
    if args.weight_decay_incr_style == "constant" and args.weight_decay >= 0:
        for name in ("start_weight_decay", "end_weight_decay"):
            if getattr(args, name) is None:
                setattr(args, name, args.weight_decay)
    return []


def data(args: Namespace, given: Collection[str]) -> list[str]:
    """Loader kind and split."""
    if args.dataloader_type is None:
        args.dataloader_type = "single"
    if (args.data_path or args.data_args_path) and args.split is None:
        args.split = "969, 30, 1"
        return [f"WARNING: --split is not given; using {args.split} for training, validation and test"]
    return []


def counters(args: Namespace, given: Collection[str]) -> list[str]:
    """Progress, from zero; a checkpoint raises it."""
    args.consumed_train_samples = args.skipped_train_samples = args.consumed_valid_samples = 0
    args.padded_vocab_size = getattr(args, "padded_vocab_size", None)
    return []


def skipped_iterations(args: Namespace, given: Collection[str]) -> list[str]:
    """Iterations whose results an earlier run rejected."""
    path = args.result_rejected_tracker_filename
    if path is None:
        return []
    from megatron.core.rerun_state_machine import RerunStateMachine

    try:
        rejected = RerunStateMachine.get_skipped_iterations_from_tracker_file(path)
    except (OSError, ValueError):
        return []
    args.iterations_to_skip = list(dict.fromkeys([*args.iterations_to_skip, *rejected]))
    return []


def normalize_aliases(args: Namespace, given: Collection[str]) -> list[str]:
    """Values with another spelling."""
    args.cross_entropy_fusion_impl = "native"
    if args.npu_deterministic:
        args.deterministic_mode = True
    return []


STEPS: tuple[Derivation, ...] = (
    clamp_sizes,
    context_scheme,
    virtual_stages,
    parallel_layout,
    batch_size,
    depth_and_length,
    widths,
    experts,
    positions,
    activation,
    layer_spec,
    biases,
    attention,
    recompute,
    precision,
    weight_decay,
    data,
    counters,
    skipped_iterations,
    normalize_aliases,
)
