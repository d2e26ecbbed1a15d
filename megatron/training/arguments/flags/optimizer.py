"""Optimizer, schedules of the learning rate and of the weight decay, dropout."""

from argparse import Namespace

from megatron.training.arguments.flag import (
    Group,
    NotBuilt,
    Opponent,
    Withdrawn,
    above,
    alike,
    at_least,
    between,
    fraction_below,
    off_switch,
    switch,
    unless,
    value,
    without,
)
from megatron.training.arguments.flags.shared import WEIGHTS_ALONE, loads


def _has_warmup(args: Namespace) -> bool:
    return bool(args.lr_warmup_fraction or args.lr_warmup_iters or args.lr_warmup_samples)


FP32_ALONE = NotBuilt(
    "the precision-aware optimizer", "leave it at fp32", asks=lambda kind: kind in ("bf16", "fp16", "fp8")
)
HOST_OPTIMIZER = NotBuilt("optimizer state on the host")
CONSTANT_RATE = unless(
    lambda a: a.lr_decay_style != "constant", "with --lr-decay-style constant the rate never falls"
)
CONSTANT_RATE_AND_WARMUP = unless(
    lambda a: a.lr_decay_style != "constant" or a.lr_warmup_fraction,
    "with --lr-decay-style constant the rate never falls",
)
WITHOUT_STORED_SCHEDULE = without("--load: there are no stored values to choose between", loads)
SCHEDULE_LEFT_OUT = unless(lambda a: not a.no_load_optim, "--no-load-optim leaves the stored schedule out")

REGULARIZATION = Group(
    "regularization",
    (
        value(
            "--attention-dropout",
            type=float,
            default=0.1,
            bounds=between(0, 1),
            help="dropout on attention probabilities",
        ),
        value(
            "--hidden-dropout",
            type=float,
            default=0.1,
            bounds=between(0, 1),
            help="dropout on hidden states and embeddings",
        ),
        value(
            "--weight-decay",
            type=float,
            default=0.01,
            bounds=at_least(0),
            no_effect=unless(
                lambda a: a.weight_decay_incr_style == "constant",
                "--start-weight-decay and --end-weight-decay take its place",
            ),
            help="decoupled weight decay (constant style)",
        ),
        value(
            "--start-weight-decay",
            type=float,
            bounds=at_least(0),
            help="weight decay at step 0 for growing styles",
        ),
        value(
            "--end-weight-decay",
            type=float,
            bounds=at_least(0),
            help="weight decay at the end for growing styles",
        ),
        value(
            "--weight-decay-incr-style",
            default="constant",
            choices=("constant", "linear", "cosine"),
            help="how weight decay grows (constant/linear/cosine)",
        ),
        value(
            "--clip-grad",
            type=float,
            default=1.0,
            bounds=at_least(0),
            help="global L2 norm threshold; 0 disables clipping",
        ),
        value(
            "--adam-beta1",
            type=float,
            default=0.9,
            bounds=fraction_below(1),
            no_effect=without("--optimizer adam"),
            help="Adam first moment decay",
        ),
        value(
            "--adam-beta2",
            type=float,
            default=0.999,
            bounds=fraction_below(1),
            no_effect=without("--optimizer adam"),
            help="Adam second moment decay",
        ),
        value(
            "--adam-eps",
            type=float,
            default=1e-08,
            bounds=above(0),
            no_effect=without("--optimizer adam"),
            help="Adam epsilon",
        ),
        value(
            "--sgd-momentum",
            type=float,
            default=0.9,
            bounds=fraction_below(1),
            no_effect=without("--optimizer sgd"),
            help="SGD momentum",
        ),
    ),
)

OPTIMIZER = Group(
    "optimizer",
    (
        value("--optimizer", default="adam", choices=("adam", "sgd"), help="adam (AdamW) or sgd"),
        *alike(
            HOST_OPTIMIZER,
            switch("--optimizer-cpu-offload", help="keep optimizer state and step on the host"),
            value("--optimizer-offload-fraction", type=float, default=1.0, help="share of state to offload"),
            switch("--use-torch-optimizer-for-cpu-offload", help="use torch optimizers in offload mode"),
            switch("--overlap-cpu-optimizer-d2h-h2d", help="overlap host step with copies"),
            off_switch("--no-pin-cpu-grads", "pin_cpu_grads", help="do not pin host gradients"),
            off_switch("--no-pin-cpu-params", "pin_cpu_params", help="do not pin host parameters"),
        ),
        switch(
            "--use-precision-aware-optimizer",
            status=NotBuilt("the precision-aware optimizer"),
            help="lower-precision optimizer state",
        ),
        *alike(
            FP32_ALONE,
            value(
                "--main-grads-dtype",
                default="fp32",
                choices=("fp32", "bf16"),
                help="dtype of main gradients (precision-aware only)",
            ),
            value(
                "--main-params-dtype",
                default="fp32",
                choices=("fp32", "fp16"),
                help="dtype of main parameters (precision-aware only)",
            ),
            value(
                "--exp-avg-dtype",
                default="fp32",
                choices=("fp32", "fp16", "fp8"),
                help="dtype of the first moment (precision-aware only)",
            ),
            value(
                "--exp-avg-sq-dtype",
                default="fp32",
                choices=("fp32", "fp16", "fp8"),
                help="dtype of the second moment (precision-aware only)",
            ),
        ),
    ),
)

LEARNING_RATE = Group(
    "learning rate",
    (
        value("--lr", type=float, bounds=at_least(0), help="peak learning rate"),
        value(
            "--lr-decay-style",
            default="linear",
            choices=("constant", "linear", "cosine", "inverse-square-root", "WSD"),
            help="constant, linear, cosine, inverse-square-root, WSD",
        ),
        value(
            "--lr-wsd-decay-style",
            default="exponential",
            choices=("exponential", "linear", "cosine"),
            no_effect=without("--lr-decay-style WSD"),
            help="shape of the WSD cool-down",
        ),
        value(
            "--lr-decay-iters",
            type=int,
            bounds=at_least(1),
            no_effect=CONSTANT_RATE_AND_WARMUP,
            help="iterations over which the rate decays",
        ),
        value(
            "--lr-decay-samples",
            type=int,
            bounds=at_least(1),
            no_effect=CONSTANT_RATE_AND_WARMUP,
            help="samples over which the rate decays",
        ),
        value(
            "--lr-wsd-decay-samples",
            type=int,
            bounds=at_least(0),
            no_effect=(
                without("--lr-decay-style WSD"),
                unless(lambda a: a.train_samples, "the run counts iterations"),
            ),
            help="length of the WSD cool-down in samples",
        ),
        value(
            "--lr-wsd-decay-iters",
            type=int,
            bounds=at_least(0),
            no_effect=(
                without("--lr-decay-style WSD"),
                unless(lambda a: not a.train_samples, "the run counts samples"),
            ),
            help="length of the WSD cool-down in iterations",
        ),
        value(
            "--lr-warmup-fraction",
            type=float,
            bounds=fraction_below(1),
            help="warmup as a fraction of the decay span",
        ),
        value(
            "--warmup",
            type=int,
            status=Withdrawn("withdrawn", "use --lr-warmup-fraction"),
            help="withdrawn warmup argument",
        ),
        value("--lr-warmup-iters", type=int, default=0, bounds=at_least(0), help="warmup iterations"),
        value("--lr-warmup-samples", type=int, default=0, bounds=at_least(0), help="warmup samples"),
        value(
            "--lr-warmup-init",
            type=float,
            default=0.0,
            bounds=at_least(0),
            no_effect=without("a warm-up", _has_warmup),
            help="learning rate at step 0 of warmup",
        ),
        value(
            "--min-lr",
            type=float,
            default=0.0,
            bounds=at_least(0),
            no_effect=CONSTANT_RATE,
            help="floor of the learning rate",
        ),
        switch(
            "--override-opt_param-scheduler",
            opponents=Opponent(
                "--use-checkpoint-opt_param-scheduler",
                "keep the first to follow the command line, the second to follow the checkpoint",
            ),
            no_effect=(WITHOUT_STORED_SCHEDULE, WEIGHTS_ALONE, SCHEDULE_LEFT_OUT),
            help="ignore scheduler values of the checkpoint",
        ),
        switch(
            "--use-checkpoint-opt_param-scheduler",
            no_effect=(WITHOUT_STORED_SCHEDULE, WEIGHTS_ALONE, SCHEDULE_LEFT_OUT),
            help="take scheduler values from the checkpoint",
        ),
        value(
            "--decoupled-lr",
            type=float,
            bounds=at_least(0),
            help="own peak rate for embedding and output layer",
        ),
        value(
            "--decoupled-min-lr",
            type=float,
            bounds=at_least(0),
            no_effect=(CONSTANT_RATE, without("--decoupled-lr")),
            help="own floor for embedding and output layer",
        ),
    ),
)
