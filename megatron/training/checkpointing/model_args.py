"""Arguments stored in a checkpoint: taken over with ``--use-checkpoint-args``, compared on any other load."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from megatron.core.errors import CheckpointError, ConfigError
from megatron.training.agreement import failing_together, world_size
from megatron.training.arguments.flags import ALL_FLAGS
from megatron.training.checkpointing import run_context
from megatron.training.checkpointing.locate import _load_base_checkpoint
from megatron.training.checkpointing.run_context import get_checkpoint_version
from megatron.training.utils import print_rank_0

# fmt: off
# Taken over only where the command line left None.
FILL = (
    "num_layers", "hidden_size", "ffn_hidden_size", "seq_length", "num_attention_heads", "kv_channels",
    "max_position_embeddings", "padded_vocab_size", "ckpt_format",
)

# Taken over, whether or not the command line gives them: they define the weights or how they are used.
FORCE = (
    "num_query_groups", "group_query_attention",
    "position_embedding_type", "add_position_embedding", "use_rotary_position_embeddings",
    "rotary_base", "rotary_percent", "rotary_interleaved",
    "add_bias_linear", "add_qkv_bias", "squared_relu", "swiglu", "untie_embeddings_and_output_weights",
    "apply_layernorm_1p", "normalization", "apply_query_key_layer_scaling",
    "attention_dropout", "hidden_dropout",
    "hybrid_override_pattern", "spec", "hybrid_attention_ratio", "hybrid_mlp_ratio",
    "num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_token_dispatcher_type",
    "moe_router_pre_softmax", "moe_grouped_gemm", "moe_shared_expert_intermediate_size",
    "mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "is_hybrid_model",
    "heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json",
    "tokenizer_type", "tokenizer_model", "tiktoken_pattern",
)

# Also part of the model, although the original leaves them to the command line.
FORCE_EXTENSION = (
    "norm_epsilon", "qk_layernorm", "openai_gelu", "is_x_model", "glu_gate_last", "geglu", "gelu_tanh",
    "post_norm", "embedding_multiplier_scale", "output_multiplier_scale",
    "attn_logit_softcapping", "output_logit_softcapping",
    "use_rope_scaling", "rope_scaling_factor", "rotary_seq_len_interpolation_factor",
    "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim",
    "v_head_dim", "rotary_scaling_factor", "mscale", "mscale_all_dim", "mtp_num_layers",
    "mtp_before_norm",
)

# Arguments of a feature, by the argument that switches it on. The values that a model without the feature
# happens to have are left where they are: they mean nothing, and may ask this version for what it lacks.
SWITCHES = {
    "moe_": "num_experts", "expert_tensor_": "num_experts",
    "mamba_": "is_hybrid_model", "hybrid_": "is_hybrid_model",
}
SWITCHES |= dict.fromkeys(
    ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "mscale",
     "rotary_scaling_factor"),
    "multi_latent_attention",
)

PARALLEL_FORCE = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size",
)
PARALLEL_FILL = ("num_layers_per_virtual_pipeline_stage",)
# fmt: on

# Stored by checkpoints that predate an argument.
_DEFAULTS = {"add_position_embedding": True}


def load_args_from_checkpoint(
    args: argparse.Namespace, load_arg: str = "load", checkpointing_context: dict[str, Any] | None = None
) -> tuple[argparse.Namespace, argparse.Namespace | None]:
    """Fill model arguments from the checkpoint under ``--load``; prints a line for every argument.

    Returns:
        ``args``, changed in place, and the checkpoint's own arguments (None where there is no checkpoint).

    Raises:
        CheckpointError: the checkpoint cannot be read, or holds no arguments.
    """
    load_dir = getattr(args, load_arg)
    if load_dir is None:
        print_rank_0("No load directory specified, using provided arguments.")
        return args, None
    if getattr(args, "non_persistent_ckpt_type", None) == "local":
        raise ConfigError(
            "--use-checkpoint-args does not work with --non-persistent-ckpt-type local: leave one of them out"
        )
    found = _from_rank_0(lambda: _stored_args(load_dir, args, checkpointing_context))
    if found is None:
        print_rank_0("Checkpoint not found to provide arguments, using provided arguments.")
        return args, None
    stored, args.iteration, version = found
    if hasattr(stored, "disable_bias_linear"):
        stored.add_bias_linear = not stored.disable_bias_linear
    for field in FILL:
        _take(args, stored, field, force=False)
    keep_tokenizer = not getattr(args, "use_tokenizer_model_from_checkpoint_args", True)
    for field in (*FORCE, *FORCE_EXTENSION):
        if not (field == "tokenizer_model" and keep_tokenizer) and _in_use(field, stored):
            _take(args, stored, field, force=True)
    if getattr(args, "use_mp_args_from_checkpoint_args", False):
        _take_parallel_sizes(args, stored, version)
    return args, stored


def _stored_args(
    load_dir: str, args: argparse.Namespace, checkpointing_context: dict[str, Any] | None
) -> tuple[argparse.Namespace, int, float] | None:
    """Arguments, iteration and version of the checkpoint; None where there is none."""
    state_dict, name, release, _ = _load_base_checkpoint(
        load_dir, args, rank0=True, checkpointing_context=checkpointing_context
    )
    if state_dict is None:
        return None
    if "args" not in state_dict:
        raise CheckpointError(
            f"{name} stores no arguments: give the model's flags instead of --use-checkpoint-args"
        )
    iteration = 0 if release else state_dict.get("iteration", 0)
    return state_dict["args"], iteration, state_dict.get("checkpoint_version", 0)


def _from_rank_0(read: Callable[[], Any]) -> Any:
    """Result of ``read`` on rank 0, for all ranks: another host may lack the file, or have an older one."""
    if world_size() == 1:
        return read()
    answer: list[Any] = [None]
    with failing_together():
        if torch.distributed.get_rank() == 0:
            answer = [read()]
    torch.distributed.broadcast_object_list(answer, src=0)
    return answer[0]


def _in_use(field: str, stored: argparse.Namespace) -> bool:
    """False for an argument of a feature that the checkpoint's model does without."""
    switches = [switch for prefix, switch in SWITCHES.items() if field.startswith(prefix)]
    return all(getattr(stored, switch, None) for switch in switches)


def _take_parallel_sizes(args: argparse.Namespace, stored: argparse.Namespace, version: float) -> None:
    if version < 3.0:
        _take(args, stored, "tensor_model_parallel_size", force=True, stored_as="model_parallel_size")
        return
    for field in PARALLEL_FORCE:
        _take(args, stored, field, force=True)
    for field in PARALLEL_FILL:
        _take(args, stored, field, force=False)


def _take(
    args: argparse.Namespace,
    stored: argparse.Namespace,
    field: str,
    force: bool,
    stored_as: str | None = None,
) -> None:
    if not force and getattr(args, field, None) is not None:
        return
    value = getattr(stored, stored_as or field, None)
    if value is None:
        print_rank_0(f"Checkpoint did not provide arguments {field}")
        return
    print_rank_0(f"Setting {field} to {value} from checkpoint")
    setattr(args, field, value)


def check_checkpoint_args(checkpoint_args: argparse.Namespace) -> None:
    """Compare the arguments that must not change between saving and loading.

    Raises:
        CheckpointError: naming every argument that differs, with both values.
    """
    args = run_context.get_args()
    pairs = [(field, field) for field in _fields_to_compare(args)]
    if args.ckpt_format == "torch":
        old = (get_checkpoint_version() or 0) < 3.0
        pairs.append(
            ("tensor_model_parallel_size", "model_parallel_size" if old else "tensor_model_parallel_size")
        )
        if not old:
            pairs.append(("pipeline_model_parallel_size", "pipeline_model_parallel_size"))
    problems = []
    for field, stored_as in pairs:
        stored = getattr(checkpoint_args, stored_as, _DEFAULTS.get(field))
        here = getattr(args, field)
        if stored != here:
            problems.append(_difference(field, stored, here))
    if args.ckpt_format == "torch":
        for field in ("virtual_pipeline_model_parallel_size", "expert_model_parallel_size"):
            stored, here = (getattr(a, field, None) or 1 for a in (checkpoint_args, args))
            if stored != here:
                problems.append(_difference(field, stored, here))
        stored, here = (_parts_of_experts(a) for a in (checkpoint_args, args))
        if getattr(args, "num_experts", None) and stored != here:
            problems.append(_difference("expert_tensor_parallel_size", stored, here))
    if problems:
        words = flags_to_change(checkpoint_args, args)
        remedy = f"\nTo go on with it, start with: {', '.join(words)}." if words else ""
        raise CheckpointError(
            "the checkpoint does not fit this run:\n"
            + "\n".join(problems)
            + f"{remedy}\nTo start anew, give another directory with --load."
        )


def _parts_of_experts(args: argparse.Namespace) -> int | None:
    """Ranks that split an expert: as many as split dense layers, if nothing else is said."""
    own = getattr(args, "expert_tensor_parallel_size", None)
    return own or getattr(args, "tensor_model_parallel_size", None)


def _difference(field: str, stored: Any, here: Any) -> str:
    known = {flag.dest: flag.name for flag in ALL_FLAGS}
    name = known.get(field, field.replace("_", " "))
    return f"  {name}: {stored} in the checkpoint, {here} in this run"


def flags_to_change(stored: argparse.Namespace, args: argparse.Namespace) -> list[str]:
    """The flags, with values, of the model and parallel sizes that a checkpoint was saved with.

    The advice is not ``--use-checkpoint-args``, which leaves sizes given on the command line as they are.
    """
    flags = {flag.dest: flag for flag in ALL_FLAGS}
    fields = (*FILL, *FORCE, *FORCE_EXTENSION, "make_vocab_size_divisible_by", *PARALLEL_FORCE)
    changes = []
    for field in dict.fromkeys(fields):
        value, here = getattr(stored, field, None), getattr(args, field, None)
        if value is None or value == here or not _in_use(field, stored):
            continue
        if field == "virtual_pipeline_model_parallel_size":
            changes.append(f"--num-virtual-stages-per-pipeline-rank {value}")
        elif field in flags and (words := flags[field].words(value)) not in changes:
            changes.append(words)
    return changes


def _fields_to_compare(args: argparse.Namespace) -> list[str]:
    fields = ["num_layers", "hidden_size", "num_attention_heads", "add_position_embedding"]
    if getattr(args, "vocab_file", None):
        fields += ["max_position_embeddings", "make_vocab_size_divisible_by", "tokenizer_type"]
        if args.ckpt_format == "torch":
            fields.append("padded_vocab_size")
    if getattr(args, "data_parallel_random_init", False):
        fields.append("data_parallel_random_init")
    return fields
