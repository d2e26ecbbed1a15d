"""Batch size, length of the run, when it stops, evaluation."""

from argparse import Namespace

from megatron.training.arguments.flag import Group, Withdrawn, at_least, switch, unless, value


def _skips_an_iteration(args: Namespace) -> bool:
    end = args.train_iters or float("inf")
    return any(0 <= iteration < end for iteration in args.iterations_to_skip)


RUN = Group(
    "training run",
    (
        value(
            "--micro-batch-size",
            type=int,
            bounds=at_least(1),
            most=10**7,
            help="sequences per forward pass per data-parallel rank",
        ),
        value(
            "--batch-size",
            type=int,
            status=Withdrawn("withdrawn", "use --micro-batch-size"),
            help="withdrawn spelling of the micro batch size",
        ),
        value(
            "--global-batch-size",
            type=int,
            bounds=at_least(1),
            most=10**7,
            help="sequences per optimizer step over the whole job",
        ),
        value("--rampup-batch-size", nargs="*", help="three numbers: start size, increment, ramp samples"),
        switch(
            "--decrease-batch-size-if-needed",
            help="round the batch down to a multiple of mbs*dp instead of failing",
        ),
        value("--train-iters", type=int, bounds=at_least(0), help="iterations over all runs"),
        value("--train-samples", type=int, bounds=at_least(0), help="samples over all runs"),
        value(
            "--log-interval",
            type=int,
            default=100,
            bounds=at_least(1),
            read="when something is logged",
            help="iterations between log lines",
        ),
        value(
            "--exit-interval",
            type=int,
            bounds=at_least(0),
            no_effect=unless(lambda a: a.exit_interval, "0 sets no limit; give 1 or more, or leave it out"),
            read="in every step",
            help="stop when iteration is a multiple of N",
        ),
        value(
            "--exit-duration-in-mins",
            type=int,
            bounds=at_least(0),
            no_effect=unless(
                lambda a: a.exit_duration_in_mins, "0 sets no limit; give 1 or more, or leave it out"
            ),
            read="in every step",
            help="stop after N minutes since start",
        ),
        switch("--exit-signal-handler", help="save and stop on SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C"),
        value(
            "--iterations-to-skip",
            type=int,
            default=[],
            nargs="+",
            no_effect=unless(_skips_an_iteration, "the run has no such iteration"),
            read="in every step",
            help="iterations whose data is consumed without training",
        ),
        value(
            "--result-rejected-tracker-filename",
            help="file logging rejected results; its iterations are skipped on restart",
        ),
        value(
            "--dataloader-type",
            choices=("single", "cyclic", "external"),
            help="single pass, cyclic (reshuffled) or external loader",
        ),
        value("--tensorboard-dir", help="TensorBoard directory (last rank writes)"),
        value(
            "--train-sync-interval",
            type=int,
            bounds=at_least(1),
            read="in every step",
            help="device synchronise every N iterations",
        ),
        switch("--calculate-per-token-loss", help="divide gradients by the global count of unmasked tokens"),
    ),
)

VALIDATION = Group(
    "validation",
    (
        value(
            "--eval-iters",
            type=int,
            default=100,
            bounds=at_least(0),
            help="batches per evaluation; 0 disables",
        ),
        value(
            "--eval-interval",
            type=int,
            default=1000,
            bounds=at_least(0),
            no_effect=unless(lambda a: a.eval_iters, "--eval-iters 0 switches evaluation off"),
            help="iterations between evaluations",
        ),
        switch("--skip-train", help="only evaluate"),
    ),
)
