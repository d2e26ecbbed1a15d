"""The flags behind the config fields that a message of ``megatron.core`` speaks of."""

import re
from functools import cache

from megatron.training.arguments.flags import ALL_FLAGS

# Fields whose flags bear another name, or that several flags set.
_OTHERWISE = {
    "blend_per_split": "--train-data-path, --valid-data-path, --test-data-path",
    "bias_activation_fusion": "--no-bias-gelu-fusion and --no-bias-swiglu-fusion turn it off",
    "average_in_collective": "--ddp-average-in-collective",
    "end_wd": "--weight-decay or --end-weight-decay",
    "error_injector": "--error-injection-rate",
    "GPTDatasetConfig.tokenizer": "--tokenizer-type, --tokenizer-model, --vocab-file, --vocab-size",
    "layernorm_epsilon": "--norm-epsilon",
    "log_option": "--timing-log-option",
    "lr_decay_steps": "--lr-decay-iters, --lr-decay-samples or --train-iters",
    "lr_warmup_steps": "--lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction",
    "max_lr": "--lr",
    "num_layers_in_first_pipeline_stage": "--decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "--decoder-last-pipeline-num-layers",
    "num_moe_experts": "--num-experts",
    "path_to_cache": "--data-cache-path",
    "sequence_length": "--seq-length",
    "start_wd": "--weight-decay or --start-weight-decay",
    "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": "--train-iters or --train-samples",
}
# A word with an underscore, or a config class and its field; no part of a path, of a flag or of a call.
_FIELD = re.compile(r"(?<![\w/.-])([A-Z]\w*Config\.\w+|[a-z][a-z0-9]*_\w+)(?![\w/(-]|\.\w)")


@cache
def _flags() -> dict[str, str]:
    """Every field that a flag sets, and how the flag is typed."""
    found = {}
    for flag in ALL_FLAGS:
        turns_off = flag.options.get("action") == "store_false"
        found[flag.dest] = f"{flag.name} turns it off" if turns_off else flag.name
    return found | _OTHERWISE


def with_flags(message: str) -> str:
    """The message, followed by the flags of the config fields it speaks of, unless it names them itself."""
    named = {}
    for field in dict.fromkeys(_FIELD.findall(message)):
        flags = _flags().get(field) or _flags().get(field.rpartition(".")[2])
        if flags is not None and not all(word in message for word in re.findall(r"--[\w-]+", flags)):
            named[field] = flags
    if not named:
        return message
    return f"{message} ({'; '.join(f'{field}: {flags}' for field, flags in named.items())})"
