"""Flags whose feature does not exist yet.  Building a feature means deleting its rows here.

A row stops the run, so that no flag is ever ignored in silence.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron.training.arguments.flag import Flag
from megatron.training.arguments.flags import GROUPS
from megatron.training.arguments.problem import Problem

Predicate = Callable[[Any], bool]


@dataclass(frozen=True)
class NotBuilt:
    """One row.

    Attributes:
        flag: the flag.
        feature: what it asks for, as a noun phrase.
        remedy: what to do instead.
        asks: whether a value asks for the feature; by default every value but the flag's own default.
    """

    flag: str
    feature: str
    remedy: str = "leave it out"
    asks: Predicate | None = None


def _above(limit: int) -> Predicate:
    return lambda value: value is not None and value > limit


def _is(*words: str) -> Predicate:
    return lambda value: value in words


def _contains(*words: str) -> Predicate:
    return lambda value: bool(set(value or ()) & set(words))


def _rows(feature: str, flags: str, remedy: str = "leave it out") -> tuple[NotBuilt, ...]:
    """Rows for several flags of one feature, each asked for by any value but its default."""
    return tuple(NotBuilt(f"--{name}", feature, remedy) for name in flags.split())


NOT_BUILT: tuple[NotBuilt, ...] = (
    NotBuilt("--expert-model-parallel-size", "expert parallelism", "leave it out or set it to 1", _above(1)),
    *_rows(
        "a late weight gradient of the output layer", "defer-embedding-wgrad-compute wgrad-deferral-limit"
    ),
    *_rows(
        "an encoder on ranks of its own",
        "pipeline-model-parallel-split-rank encoder-tensor-model-parallel-size "
        "encoder-pipeline-model-parallel-size",
    ),
    *_rows("overlapping the warm-up and the end of a pipeline", "overlap-p2p-communication-warmup-flush"),
    *_rows("gathering parameters during the optimizer's step", "overlap-param-gather-with-optimizer-step"),
    *_rows("several copies of the sharded optimizer", "num-distributed-optimizer-instances"),
    *_rows(
        "fully sharded data parallelism",
        "use-custom-fsdp use-torch-fsdp2 init-model-with-meta-device data-parallel-sharding-strategy",
    ),
    NotBuilt("--num-experts", "mixture of experts", asks=bool),
    *_rows(
        "mixture of experts",
        "moe-layer-freq moe-ffn-hidden-size moe-shared-expert-intermediate-size moe-shared-expert-overlap "
        "moe-grouped-gemm moe-layer-recompute moe-use-upcycling moe-router-load-balancing-type "
        "moe-router-dtype moe-router-score-function moe-router-topk moe-router-pre-softmax "
        "moe-router-num-groups moe-router-group-topk moe-router-topk-scaling-factor "
        "moe-router-enable-expert-bias moe-router-bias-update-rate moe-aux-loss-coeff moe-z-loss-coeff "
        "moe-input-jitter-eps moe-per-layer-logging moe-token-dispatcher-type moe-expert-capacity-factor "
        "moe-pad-expert-input-to-capacity moe-token-drop-policy first-k-dense-replace input-jitter",
    ),
    *_rows(
        "multi-latent attention",
        "multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim "
        "rotary-scaling-factor mscale mscale-all-dim",
    ),
    *_rows("multi-token prediction", "mtp-num-layers mtp-loss-scaling-factor"),
    *_rows("the Grok layer", "post-norm embedding-multiplier-scale output-multiplier-scale"),
    NotBuilt("--spec", "the Grok layer", asks=lambda value: "grok" in " ".join(value or ()).lower()),
    *_rows("identity layers", "noop-layers"),
    NotBuilt(
        "--position-embedding-type",
        "relative position bias",
        "use learned_absolute, rope or none",
        _is("relative"),
    ),
    *_rows("relative position bias", "relative-attention-num-buckets relative-attention-max-distance"),
    *_rows(
        "training of encoder-decoder and BERT models",
        "decoder-num-layers decoder-seq-length mask-prob short-seq-prob bert-no-binary-head",
    ),
    NotBuilt(
        "--recompute-modules",
        "recompute of experts and latent projections",
        "choose among core_attn, layernorm and mlp",
        _contains("moe_act", "mla_up_proj", "moe"),
    ),
    NotBuilt(
        "--ckpt-format",
        "this checkpoint format",
        "use --ckpt-format torch",
        lambda value: value not in (None, "torch"),
    ),
    *_rows("the distributed checkpoint format", "ckpt-assume-constant-structure dist-ckpt-strictness"),
    *_rows("asynchronous saving", "async-save use-persistent-ckpt-worker"),
    *_rows(
        "rolling checkpoints",
        "non-persistent-save-interval non-persistent-global-ckpt-dir",
        "use --save with --save-interval",
    ),
    NotBuilt(
        "--non-persistent-ckpt-type",
        "rolling checkpoints",
        "use --save with --save-interval",
        _is("global"),
    ),
    *_rows("conversion between checkpoint formats", "ckpt-convert-format ckpt-convert-save"),
    *_rows("the precision-aware optimizer", "use-precision-aware-optimizer"),
    *(
        NotBuilt(f"--{name}", "the precision-aware optimizer", "leave it at fp32", _is("bf16", "fp16", "fp8"))
        for name in ("main-grads-dtype", "main-params-dtype", "exp-avg-dtype", "exp-avg-sq-dtype")
    ),
    *_rows(
        "optimizer state on the host",
        "optimizer-cpu-offload optimizer-offload-fraction use-torch-optimizer-for-cpu-offload "
        "overlap-cpu-optimizer-d2h-h2d no-pin-cpu-grads no-pin-cpu-params",
    ),
    *_rows("index files in object storage", "s3-cache-path", "copy the data to a local disk"),
    *_rows("validation of results by rerunning them", "rerun-mode", "use --rerun-mode disabled"),
)


@cache
def flags_by_name() -> dict[str, Flag]:
    """Every working flag by each of its spellings."""
    return {name: flag for group in GROUPS for flag in group.flags for name in flag.names}


def not_built_problems(args: Namespace) -> list[Problem]:
    """A problem for every row that ``args`` asks for."""
    problems = []
    for row in NOT_BUILT:
        flag = flags_by_name()[row.flag]
        value = getattr(args, flag.dest, flag.default)
        asked = row.asks(value) if row.asks else value != flag.default
        if asked:
            shown = None if isinstance(value, bool) else value
            problems.append(Problem(row.flag, shown, f"{row.feature} is not built yet", row.remedy))
    return problems
