"""Flags that work, but not in the company they were given in: a warning says so."""

from argparse import Namespace
from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class NoEffect:
    """``flags`` do nothing unless ``needed`` holds."""

    flags: str
    needs: str
    needed: Callable[[Namespace], object]


NO_EFFECT = (
    NoEffect("num-query-groups", "--group-query-attention", lambda a: a.group_query_attention),
    NoEffect(
        "recompute-method recompute-num-layers recompute-modules",
        "--recompute-granularity",
        lambda a: a.recompute_granularity,
    ),
    NoEffect("rope-scaling-factor", "--use-rope-scaling", lambda a: a.use_rope_scaling),
    NoEffect(
        "rotary-base rotary-percent rotary-interleaved rotary-seq-len-interpolation-factor use-rope-scaling",
        "--position-embedding-type rope",
        lambda a: a.position_embedding_type == "rope",
    ),
    NoEffect("loss-scale", "--fp16 or --bf16", lambda a: a.fp16 or a.bf16),
    NoEffect(
        "initial-loss-scale min-loss-scale loss-scale-window hysteresis",
        "--fp16 and a scale that is searched for (no --loss-scale)",
        lambda a: a.fp16 and a.loss_scale is None,
    ),
    NoEffect("grad-reduce-in-bf16", "--bf16", lambda a: a.bf16),
    NoEffect("decoupled-min-lr", "--decoupled-lr", lambda a: a.decoupled_lr is not None),
    NoEffect(
        "lr-wsd-decay-style lr-wsd-decay-iters lr-wsd-decay-samples",
        "--lr-decay-style WSD",
        lambda a: a.lr_decay_style == "WSD",
    ),
    NoEffect("sgd-momentum", "--optimizer sgd", lambda a: a.optimizer == "sgd"),
    NoEffect("adam-beta1 adam-beta2 adam-eps", "--optimizer adam", lambda a: a.optimizer == "adam"),
    NoEffect("lr-warmup-init", "a warm-up", lambda a: _has_warmup(a)),
    NoEffect(
        "tokenizer-name-or-path",
        "--tokenizer-type PretrainedFromHF",
        lambda a: a.tokenizer_type == "PretrainedFromHF",
    ),
    NoEffect("ckpt-step exit-on-missing-checkpoint no-load-optim no-load-rng", "--load", lambda a: a.load),
    NoEffect("save-interval no-save-optim no-save-rng log-progress", "--save", lambda a: a.save),
    NoEffect(
        "profile-step-start profile-step-end use-pytorch-profiler profile-ranks",
        "--profile",
        lambda a: a.profile,
    ),
    NoEffect("manual-gc-interval no-manual-gc-eval", "--manual-gc", lambda a: a.manual_gc),
    NoEffect("wandb-exp-name wandb-save-dir", "--wandb-project", lambda a: a.wandb_project),
    NoEffect(
        "tensorboard-log-interval tensorboard-queue-size log-timers-to-tensorboard "
        "log-validation-ppl-to-tensorboard log-memory-to-tensorboard log-world-size-to-tensorboard",
        "--tensorboard-dir",
        lambda a: a.tensorboard_dir or a.wandb_project,
    ),
    NoEffect("no-data-sharding", "--dataloader-type cyclic", lambda a: a.dataloader_type == "cyclic"),
    NoEffect("coc-parallel-num", "--use-ascend-coc", lambda a: a.use_ascend_coc),
    NoEffect(
        "use-ascend-coc",
        "--tensor-model-parallel-size 2 or more",
        lambda a: a.tensor_model_parallel_size > 1,
    ),
    NoEffect(
        "use-ascend-mc2",
        "--sequence-parallel and --tensor-model-parallel-size 2 or more",
        lambda a: a.sequence_parallel and a.tensor_model_parallel_size > 1,
    ),
    NoEffect(
        "hccl-group-buffer",
        "a device whose collectives take sizes of buffers",
        lambda a: _takes_sizes_of_buffers(),
    ),
    NoEffect("next-tockens", "--pre-tockens", lambda a: a.pre_tockens is not None),
)


def _takes_sizes_of_buffers() -> bool:
    from megatron.core import accelerator  # with torch, which tools that share these flags do not need

    return accelerator.companion("communicator_options") is not None


def _has_warmup(args: Namespace) -> bool:
    return bool(args.lr_warmup_fraction or args.lr_warmup_iters or args.lr_warmup_samples)


def warnings_about(args: Namespace, given: Collection[str]) -> list[str]:
    """One line for every flag in ``given`` that changes nothing."""
    return [
        f"WARNING: --{flag} has no effect without {row.needs}"
        for row in NO_EFFECT
        for flag in row.flags.split()
        if f"--{flag}" in given and not row.needed(args)
    ]
