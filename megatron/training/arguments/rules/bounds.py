"""Rules about one number at a time, as a table."""

import math
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass

from megatron.training.arguments.not_built import flags_by_name
from megatron.training.arguments.problem import Problem


@dataclass(frozen=True)
class Bound:
    """A range for the values of some flags; ``open_low`` and ``open_high`` leave the end out."""

    flags: str
    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return math.isfinite(number) and above and below

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        if self.high == math.inf:
            return f"must be {low}"
        return f"must be {low} and {'below' if self.open_high else 'at most'} {self.high:g}"


@dataclass(frozen=True)
class Limit:
    """The largest value of some flags: beyond it nothing could be built, and counting would not end."""

    flags: str
    most: int


LIMITS = (
    Limit(
        "num-layers encoder-num-layers num-attention-heads num-query-groups tensor-model-parallel-size "
        "pipeline-model-parallel-size context-parallel-size expert-model-parallel-size "
        "expert-tensor-parallel-size num-layers-per-virtual-pipeline-stage "
        "num-virtual-stages-per-pipeline-rank microbatch-group-size-per-virtual-pipeline-stage "
        "decoder-first-pipeline-num-layers decoder-last-pipeline-num-layers ulysses-degree-in-cp "
        "vocab-extra-ids tiktoken-num-special-tokens distributed-timeout-minutes",
        10**6,
    ),
    Limit("micro-batch-size global-batch-size", 10**7),
    Limit(
        "hidden-size ffn-hidden-size kv-channels seq-length encoder-seq-length max-position-embeddings "
        "vocab-size make-vocab-size-divisible-by",
        2**31 - 1,
    ),
    Limit("num-workers num-dataset-builder-threads", 1024),
)
# Numbers travel between ranks, and into files, in 64 bits.
_MOST = 2**63 - 1

BOUNDS = (
    Bound(
        "num-layers encoder-num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels "
        "num-query-groups max-position-embeddings seq-length encoder-seq-length micro-batch-size "
        "global-batch-size make-vocab-size-divisible-by vocab-size log-interval tensorboard-log-interval "
        "tensorboard-queue-size save-interval recompute-num-layers rotary-base "
        "rotary-seq-len-interpolation-factor num-dataset-builder-threads seed tensor-model-parallel-size "
        "pipeline-model-parallel-size context-parallel-size expert-model-parallel-size "
        "distributed-timeout-minutes ddp-num-buckets ddp-bucket-size train-sync-interval "
        "check-weight-hash-across-dp-replicas-interval straggler-minmax-count loss-scale-window hysteresis "
        "lr-decay-iters lr-decay-samples",
        1,
    ),
    Bound(
        "weight-decay start-weight-decay end-weight-decay clip-grad lr min-lr decoupled-lr decoupled-min-lr "
        "lr-warmup-iters lr-warmup-samples lr-warmup-init lr-wsd-decay-iters lr-wsd-decay-samples eval-iters "
        "eval-interval num-workers train-iters train-samples pre-tockens next-tockens manual-gc-interval "
        "exit-interval exit-duration-in-mins vocab-extra-ids tiktoken-num-special-tokens profile-step-start "
        "profile-step-end ckpt-step local-rank",
        0,
    ),
    Bound("init-method-std", 0, 1000),
    Bound("loss-scale", 0, 2**32, open_low=True),
    Bound("attention-dropout hidden-dropout", 0, 1),
    Bound("straggler-ctrlr-port", 0, 65535),
    Bound("adam-beta1 adam-beta2 sgd-momentum lr-warmup-fraction", 0, 1, open_high=True),
    Bound("rotary-percent", 0, 1, open_low=True),
    Bound(
        "norm-epsilon adam-eps initial-loss-scale min-loss-scale rope-scaling-factor",
        0,
        open_low=True,
    ),
    Bound("rendezvous-timeout", 1),
)


def numbers_in_range(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Every number lies in its range."""
    problems = []
    for bound in BOUNDS:
        for word in bound.flags.split():
            flag = flags_by_name()[f"--{word}"]
            number = getattr(args, flag.dest)
            if number is None or isinstance(number, bool) or bound.holds(number):
                continue
            works = flag.default
            if not isinstance(works, (int, float)) or not bound.holds(works):
                works = _inside(bound)
            problems.append(Problem(flag.name, number, str(bound), f"for example {flag.name} {works}"))
    return problems


def numbers_beyond_limits(args: Namespace, given: Collection[str]) -> list[Problem]:
    """Numbers so large that other rules, which count, are not asked about them."""
    limits = {word: limit.most for limit in LIMITS for word in limit.flags.split()}
    problems = []
    for name, flag in flags_by_name().items():
        number, most = getattr(args, flag.dest), limits.get(name.lstrip("-"), _MOST)
        if name != flag.name or isinstance(number, bool) or not isinstance(number, int) or number <= most:
            continue
        problems.append(Problem(name, number, f"must be at most {most}", f"use a smaller {name}"))
    return problems


def _inside(bound: Bound) -> float:
    if bound.high > 1:
        return int(bound.low) + 1 if bound.open_low else int(bound.low)
    return (bound.low + bound.high) / 2


RULES = (numbers_in_range,)
