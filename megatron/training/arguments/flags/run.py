"""Batch size, length of the run, when it stops."""

from megatron.training.arguments.flag import Group, switch, value

GROUP = Group(
    "training run",
    (
        value("--micro-batch-size", type=int, help="sequences per forward pass per data-parallel rank"),
        value("--global-batch-size", type=int, help="sequences per optimizer step over the whole job"),
        value("--rampup-batch-size", nargs="*", help="three numbers: start size, increment, ramp samples"),
        switch(
            "--decrease-batch-size-if-needed",
            help="round the batch down to a multiple of mbs*dp instead of failing",
        ),
        value("--train-iters", type=int, help="iterations over all runs"),
        value("--train-samples", type=int, help="samples over all runs"),
        value("--log-interval", type=int, default=100, help="iterations between log lines"),
        value("--exit-interval", type=int, help="stop when iteration is a multiple of N"),
        value("--exit-duration-in-mins", type=int, help="stop after N minutes since start"),
        switch("--exit-signal-handler", help="save and stop on SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and Ctrl-C"),
        value(
            "--iterations-to-skip",
            type=int,
            default=[],
            nargs="+",
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
        value("--train-sync-interval", type=int, help="device synchronise every N iterations"),
        switch("--calculate-per-token-loss", help="divide gradients by the global count of unmasked tokens"),
    ),
)
