"""Working flags that change nothing, always or in the company they were given in: a warning says why."""

import os
from argparse import Namespace
from collections.abc import Callable, Collection
from dataclasses import dataclass

from megatron.training.arguments.derive_parallel import EXCHANGES
from megatron.training.arguments.not_built import flags_by_name


@dataclass(frozen=True)
class NoEffect:
    """Flags that do nothing unless ``acts`` holds of the completed arguments.

    Attributes:
        flags: their names, without dashes.
        acts: whether they change anything.
        needs: what they lack, after "has no effect without".
        because: or why they change nothing, after "has no effect:".
    """

    flags: str
    acts: Callable[[Namespace], object]
    needs: str = ""
    because: str = ""

    def sentence(self, name: str) -> str:
        """The warning about the flag spelled ``name``."""
        return f"WARNING: {name} has no effect" + (
            f" without {self.needs}" if self.needs else f": {self.because}"
        )


def _never(args: Namespace) -> bool:
    return False


def _without_fused_attention(args: Namespace) -> bool:
    return getattr(args.attention_backend, "name", args.attention_backend) in ("unfused", "local")


def _replicas(args: Namespace) -> int:
    """Ranks that hold the same parameters."""
    return args.data_parallel_size * args.context_parallel_size


def _loads(args: Namespace) -> object:
    return args.load or args.pretrained_checkpoint


def _reads_files(args: Namespace) -> object:
    sources = ("data_path", "data_args_path", "train_data_path", "valid_data_path", "test_data_path")
    return any(getattr(args, name) for name in sources) or args.per_split_data_args_path


def _has_warmup(args: Namespace) -> bool:
    return bool(args.lr_warmup_fraction or args.lr_warmup_iters or args.lr_warmup_samples)


def _spans_hosts(args: Namespace) -> bool:
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return args.world_size > 1 and (not here.isdigit() or int(here) < args.world_size)


def _profile_window_is_reached(args: Namespace) -> bool:
    return not args.train_iters or args.profile_step_start < args.train_iters


def _skips_an_iteration(args: Namespace) -> bool:
    end = args.train_iters or float("inf")
    return any(0 <= iteration < end for iteration in args.iterations_to_skip)


def _takes_sizes_of_buffers() -> bool:
    from megatron.core import accelerator  # with torch, which tools that share these flags do not need

    return accelerator.companion("communicator_options") is not None


def _has_device_memory() -> bool:
    from megatron.core import accelerator

    return accelerator.is_accelerated()


_NO_LIMIT = "0 sets no limit; give 1 or more, or leave it out"

_MODEL = (
    NoEffect("num-query-groups", lambda a: a.group_query_attention, "--group-query-attention"),
    NoEffect("rope-scaling-factor", lambda a: a.use_rope_scaling, "--use-rope-scaling"),
    NoEffect(
        "rotary-base rotary-percent rotary-interleaved rotary-seq-len-interpolation-factor use-rope-scaling",
        lambda a: a.position_embedding_type == "rope",
        "--position-embedding-type rope",
    ),
    NoEffect(
        "no-position-embedding",
        lambda a: a.position_embedding_type not in ("rope", "none"),
        because="this --position-embedding-type has no table of embeddings that could be left out",
    ),
    NoEffect("add-qkv-bias", lambda a: not a.add_bias_linear, "--disable-bias-linear: all have a bias"),
    NoEffect(
        "init-method-std",
        lambda a: not a.init_method_xavier_uniform,
        because="--init-method-xavier-uniform draws weights by their shapes",
    ),
    NoEffect("transformer-impl", lambda a: a.spec is None, because="the layers are those that --spec names"),
    NoEffect(
        "qk-layernorm",
        lambda a: a.spec is None or list(a.spec) == ["local"],
        because="the layers are those that --spec names",
    ),
    NoEffect(
        "expert-tensor-parallel-size",
        lambda a: a.num_experts or a.use_tp_pp_dp_mapping,  # which wants it to fit the dense layers' ranks
        "--num-experts",
    ),
    NoEffect(
        "openai-gelu",
        lambda a: not (a.swiglu or a.squared_relu),
        because="an MLP with --swiglu or --squared-relu has no GELU",
    ),
)

_RECOMPUTE = (
    NoEffect(
        "recompute-method recompute-num-layers recompute-modules",
        lambda a: a.recompute_granularity,
        "--recompute-granularity",
    ),
    NoEffect(
        "recompute-modules",
        lambda a: a.recompute_granularity == "selective",
        because="--recompute-granularity full computes whole layers again",
    ),
    NoEffect(
        "empty-unused-memory-level",
        lambda a: a.empty_unused_memory_level == 0 or _has_device_memory(),
        because="a CPU keeps no cache of device memory; nothing is held that could be released",
    ),
)

_KERNELS = (
    NoEffect(
        "no-persist-layer-norm",
        _never,
        because="norms have one form here; there is no persistent kernel to leave out",
    ),
    NoEffect("cross-entropy-loss-fusion", _never, because="the loss is always computed in its fused form"),
    NoEffect(
        "no-bias-dropout-fusion",
        _never,
        because="bias, dropout and residual are one function with one result; "
        "--disable-override bias_dropout_add is what puts a device's kernel aside, where it has one",
    ),
    NoEffect(
        "no-bias-swiglu-fusion",
        _never,
        because="the result is the same; --disable-override swiglu is what puts a device's kernel aside, "
        "where it has one",
    ),
    NoEffect(
        "no-rope-fusion",
        lambda a: a.position_embedding_type == "rope" and a.rotary_interleaved,
        because="the result is the same; --disable-override rotary is what puts a device's kernel aside, "
        "where it has one",
    ),
    NoEffect(
        "no-bias-gelu-fusion",
        lambda a: not (a.swiglu or a.squared_relu) and a.add_bias_linear,
        "a GELU with a bias: it chooses between the tanh form of GELU and the exact one",
    ),
    NoEffect(
        "no-masked-softmax-fusion apply-query-key-layer-scaling attention-softmax-in-fp32",
        _without_fused_attention,
        "--attention-backend unfused: the fused attention does all of it in one operation",
    ),
    NoEffect(
        "attention-softmax-in-fp32",
        lambda a: a.fp16 or a.bf16,
        because="without --fp16 or --bf16 the softmax is in fp32 anyway",
    ),
    NoEffect("no-clone-scatter-output-in-embedding", lambda a: a.sequence_parallel, "--sequence-parallel"),
    NoEffect(
        "pre-tockens",
        lambda a: a.pre_tockens is None or a.seq_length is None or a.pre_tockens < a.seq_length - 1,
        because="the window covers the whole sequence",
    ),
    NoEffect(
        "next-tockens", _never, because="causal attention sees nothing after the query, whatever it says"
    ),
    NoEffect("coc-parallel-num", lambda a: a.use_ascend_coc, "--use-ascend-coc"),
    NoEffect(
        "use-ascend-coc",
        lambda a: a.tensor_model_parallel_size > 1,
        "--tensor-model-parallel-size 2 or more",
    ),
    NoEffect(
        "use-ascend-mc2",
        lambda a: a.sequence_parallel and a.tensor_model_parallel_size > 1,
        "--sequence-parallel and --tensor-model-parallel-size 2 or more",
    ),
)

_PRECISION = (
    NoEffect("loss-scale", lambda a: a.fp16 or a.bf16, "--fp16 or --bf16"),
    NoEffect(
        "initial-loss-scale min-loss-scale loss-scale-window hysteresis",
        lambda a: a.fp16 and a.loss_scale is None,
        "--fp16 and a scale that is searched for (no --loss-scale)",
    ),
    NoEffect("grad-reduce-in-bf16", lambda a: a.bf16, "--bf16"),
    NoEffect(
        "accumulate-allreduce-grads-in-fp32",
        lambda a: a.fp16 or a.bf16,
        because="without --fp16 or --bf16 gradients are in fp32 anyway",
    ),
    NoEffect(
        "accumulate-allreduce-grads-in-fp32",
        lambda a: not (a.bf16 and a.grad_reduce_in_bf16),
        because="it gives way to --grad-reduce-in-bf16",
    ),
)

_SCHEDULE = (
    NoEffect(
        "min-lr decoupled-min-lr",
        lambda a: a.lr_decay_style != "constant",
        because="with --lr-decay-style constant the rate never falls",
    ),
    NoEffect(
        "lr-decay-iters lr-decay-samples",
        lambda a: a.lr_decay_style != "constant" or a.lr_warmup_fraction,
        because="with --lr-decay-style constant the rate never falls",
    ),
    NoEffect("decoupled-min-lr", lambda a: a.decoupled_lr is not None, "--decoupled-lr"),
    NoEffect(
        "lr-wsd-decay-style lr-wsd-decay-iters lr-wsd-decay-samples",
        lambda a: a.lr_decay_style == "WSD",
        "--lr-decay-style WSD",
    ),
    NoEffect("lr-wsd-decay-iters", lambda a: not a.train_samples, because="the run counts samples"),
    NoEffect("lr-wsd-decay-samples", lambda a: a.train_samples, because="the run counts iterations"),
    NoEffect("lr-warmup-init", _has_warmup, "a warm-up"),
    NoEffect(
        "weight-decay",
        lambda a: a.weight_decay_incr_style == "constant",
        because="--start-weight-decay and --end-weight-decay take its place",
    ),
    NoEffect("sgd-momentum", lambda a: a.optimizer == "sgd", "--optimizer sgd"),
    NoEffect("adam-beta1 adam-beta2 adam-eps", lambda a: a.optimizer == "adam", "--optimizer adam"),
    NoEffect("exit-interval", lambda a: a.exit_interval, because=_NO_LIMIT),
    NoEffect("exit-duration-in-mins", lambda a: a.exit_duration_in_mins, because=_NO_LIMIT),
    NoEffect("iterations-to-skip", _skips_an_iteration, because="the run has no such iteration"),
    NoEffect("eval-interval", lambda a: a.eval_iters, because="--eval-iters 0 switches evaluation off"),
)

_CHECKPOINTS = (
    NoEffect(
        "ckpt-step exit-on-missing-checkpoint no-load-optim no-load-rng finetune",
        _loads,
        "--load",
    ),
    NoEffect(
        "exit-on-missing-checkpoint",
        lambda a: a.ckpt_step is None,
        because="a run without the checkpoint that --ckpt-step names ends anyway",
    ),
    NoEffect(
        "override-opt_param-scheduler use-checkpoint-opt_param-scheduler",
        _loads,
        "--load: there are no stored values to choose between",
    ),
    NoEffect(
        "no-load-optim no-load-rng override-opt_param-scheduler use-checkpoint-opt_param-scheduler",
        lambda a: not a.finetune,
        because="--finetune loads the weights and nothing else",
    ),
    NoEffect(
        "override-opt_param-scheduler use-checkpoint-opt_param-scheduler",
        lambda a: not a.no_load_optim,
        because="--no-load-optim leaves the stored schedule out",
    ),
    NoEffect(
        "use-mp-args-from-checkpoint-args no-use-tokenizer-model-from-checkpoint-args",
        lambda a: a.use_checkpoint_args,
        "--use-checkpoint-args",
    ),
    NoEffect("save-interval no-save-optim no-save-rng log-progress", lambda a: a.save, "--save"),
    NoEffect(
        "auto-detect-ckpt-format",
        _never,
        because="the format of a checkpoint is always read from its directory",
    ),
    NoEffect(
        "no-ckpt-fully-parallel-save",
        lambda a: a.ckpt_format != "torch",
        because="--ckpt-format torch writes each shard once, from data-parallel rank 0, already",
    ),
    NoEffect(
        "ckpt-fully-parallel-load",
        lambda a: a.ckpt_format != "torch",
        because="in --ckpt-format torch every rank reads its own file; there is nothing to spread",
    ),
)

_PARALLEL = (
    NoEffect(
        "cp-comm-type context-parallel-algo ulysses-degree-in-cp attention-mask-type",
        lambda a: a.context_parallel_size > 1,
        "--context-parallel-size 2 or more",
    ),
    NoEffect(
        "context-parallel-algo",
        lambda a: EXCHANGES.get(a.context_parallel_algo) in (None, *a.cp_comm_type),
        because="it gives way to --cp-comm-type",
    ),
    NoEffect(
        "attention-mask-type",
        _never,
        because="attention is causal, and obeys the mask of the batch where --reset-attention-mask makes one",
    ),
    NoEffect(
        "ulysses-degree-in-cp hierarchical-context-parallel-sizes",
        lambda a: "a2a+p2p" in a.cp_comm_type,
        "--cp-comm-type a2a+p2p (or --context-parallel-algo hybrid_cp_algo)",
    ),
    NoEffect(
        "no-overlap-p2p-communication",
        lambda a: a.virtual_pipeline_model_parallel_size,
        "virtual pipeline stages: without them nothing overlaps",
    ),
    NoEffect(
        "account-for-embedding-in-pipeline-split account-for-loss-in-pipeline-split",
        lambda a: a.pipeline_model_parallel_size > 1,
        "--pipeline-model-parallel-size 2 or more",
    ),
    NoEffect(
        "use-tp-pp-dp-mapping",
        lambda a: a.pipeline_model_parallel_size > 1 and a.data_parallel_size > 1,
        "several pipeline stages and several data-parallel ranks, whose order it swaps",
    ),
    NoEffect(
        "overlap-grad-reduce overlap-param-gather ddp-average-in-collective ddp-bucket-size ddp-num-buckets "
        "check-weight-hash-across-dp-replicas-interval",
        lambda a: _replicas(a) > 1,
        "several data-parallel ranks",
    ),
    NoEffect("data-parallel-random-init", lambda a: a.data_parallel_size > 1, "several data-parallel ranks"),
    NoEffect(
        "ddp-bucket-size ddp-num-buckets no-align-grad-reduce",
        lambda a: a.overlap_grad_reduce,
        "--overlap-grad-reduce",
    ),
    NoEffect(
        "no-align-grad-reduce",
        lambda a: a.pipeline_model_parallel_size > 1,
        "--pipeline-model-parallel-size 2 or more",
    ),
    NoEffect(
        "no-align-param-gather",
        lambda a: a.overlap_param_gather and a.virtual_pipeline_model_parallel_size,
        "--overlap-param-gather and virtual pipeline stages",
    ),
    NoEffect("no-shared-storage", _spans_hosts, "ranks on several hosts"),
    NoEffect(
        "hccl-group-buffer",
        lambda a: _takes_sizes_of_buffers(),
        "a device whose collectives take sizes of buffers",
    ),
)

_DATA = (
    NoEffect(
        "split data-cache-path no-mmap-bin-files num-dataset-builder-threads",
        _reads_files,
        "--data-path: mock data are made up, a third of them for each split",
    ),
    NoEffect(
        "reset-position-ids",
        lambda a: a.position_embedding_type == "learned_absolute",
        because="this --position-embedding-type takes no position ids",
    ),
    NoEffect(
        "reset-attention-mask",
        lambda a: a.create_attention_mask_in_dataloader,
        because="--no-create-attention-mask-in-dataloader leaves the mask out",
    ),
    NoEffect(
        "no-create-attention-mask-in-dataloader",
        lambda a: a.reset_attention_mask,
        because="without --reset-attention-mask no mask is built: attention is causal by itself",
    ),
    NoEffect("no-data-sharding", lambda a: a.dataloader_type == "cyclic", "--dataloader-type cyclic"),
    NoEffect(
        "tokenizer-name-or-path",
        lambda a: a.tokenizer_type == "PretrainedFromHF",
        "--tokenizer-type PretrainedFromHF",
    ),
    NoEffect(
        "tiktoken-pattern tiktoken-num-special-tokens tiktoken-special-tokens",
        lambda a: a.tokenizer_type == "TikTokenizer",
        "--tokenizer-type TikTokenizer",
    ),
    NoEffect(
        "merge-file", lambda a: a.tokenizer_type == "GPT2BPETokenizer", "--tokenizer-type GPT2BPETokenizer"
    ),
    NoEffect(
        "vocab-file",
        lambda a: a.tokenizer_type in ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase"),
        "--tokenizer-type GPT2BPETokenizer, BertWordPieceLowerCase or BertWordPieceCase",
    ),
    NoEffect(
        "tokenizer-model",
        lambda a: (
            a.tokenizer_type
            not in ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase", "NullTokenizer")
        ),
        because="this --tokenizer-type has no model file",
    ),
)

_LOGS = (
    NoEffect("rendezvous-timeout", lambda a: a.world_size > 1, "other ranks to meet"),
    NoEffect(
        "profile-step-start profile-step-end use-pytorch-profiler profile-ranks",
        lambda a: a.profile,
        "--profile",
    ),
    NoEffect(
        "profile",
        _profile_window_is_reached,
        because="the run ends before the iteration --profile-step-start (10 unless given)",
    ),
    NoEffect(
        "profile-ranks",
        lambda a: any(0 <= rank < a.world_size for rank in a.profile_ranks),
        because="the run has none of these ranks",
    ),
    NoEffect(
        "disable-straggler-on-startup straggler-ctrlr-port straggler-minmax-count",
        lambda a: a.log_straggler,
        "--log-straggler",
    ),
    NoEffect("manual-gc-interval no-manual-gc-eval", lambda a: a.manual_gc, "--manual-gc"),
    NoEffect("no-barrier-with-level-1-timing", lambda a: a.timing_log_level, "--timing-log-level 1 or 2"),
    NoEffect("wandb-exp-name wandb-save-dir", lambda a: a.wandb_project, "--wandb-project"),
    NoEffect("tensorboard-queue-size", lambda a: a.tensorboard_dir, "--tensorboard-dir"),
    NoEffect(
        "tensorboard-log-interval log-timers-to-tensorboard no-log-loss-scale-to-tensorboard "
        "log-validation-ppl-to-tensorboard log-memory-to-tensorboard log-world-size-to-tensorboard",
        lambda a: a.tensorboard_dir or a.wandb_project,
        "--tensorboard-dir",
    ),
)

NO_EFFECT = (
    *_MODEL,
    *_RECOMPUTE,
    *_KERNELS,
    *_PRECISION,
    *_SCHEDULE,
    *_CHECKPOINTS,
    *_PARALLEL,
    *_DATA,
    *_LOGS,
)


def warnings_about(args: Namespace, given: Collection[str]) -> dict[str, str]:
    """One line for every flag in ``given`` that changes nothing, by the flag as it was spelled."""
    lines: dict[str, str] = {}
    for row in NO_EFFECT:
        for flag in row.flags.split():
            name = _spelling(f"--{flag}", given)
            if name is not None and name not in lines and not row.acts(args):
                lines[name] = row.sentence(name)
    return lines


def _spelling(name: str, given: Collection[str]) -> str | None:
    """How the flag ``name`` was written; None if it was not."""
    if name in given:
        return name
    flag = flags_by_name().get(name)
    return next((other for other in flag.names if other in given), None) if flag else None
