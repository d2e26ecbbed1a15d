"""What is printed and written to TensorBoard or W&B."""

from megatron.training.arguments.flag import Group, off_switch, switch, value

GROUP = Group(
    "logging",
    (
        value(
            "--log-arguments",
            default="changed",
            choices=("changed", "all", "none"),
            help="arguments to print at the start: those that differ from their defaults, all, or none",
        ),
        switch("--log-params-norm", help="print and record the parameter norm"),
        switch("--log-num-zeros-in-grad", help="record zeros in gradients"),
        switch("--log-throughput", help="print TFLOP/s per device"),
        switch("--log-progress", help="append to <save>/progress.txt"),
        value("--timing-log-level", type=int, default=0, choices=(0, 1, 2), help="timer detail 0-2"),
        off_switch(
            "--no-barrier-with-level-1-timing",
            "barrier_with_L1_time",
            help="no barrier around level-1 timers",
        ),
        value(
            "--timing-log-option",
            default="minmax",
            choices=("max", "minmax", "all"),
            help="max, minmax or all ranks",
        ),
        value(
            "--tensorboard-log-interval", type=int, default=1, help="iterations between TensorBoard points"
        ),
        value("--tensorboard-queue-size", type=int, default=1000, help="TensorBoard writer queue"),
        switch("--log-timers-to-tensorboard", help="write timers, iteration time and throughput"),
        off_switch(
            "--no-log-loss-scale-to-tensorboard",
            "log_loss_scale_to_tensorboard",
            help="leave the loss scale out",
        ),
        switch("--log-validation-ppl-to-tensorboard", help="write validation perplexity"),
        switch("--log-memory-to-tensorboard", help="write device memory statistics"),
        switch("--log-world-size-to-tensorboard", help="write world size"),
        value("--wandb-project", default="", help="W&B project (enables W&B)"),
        value("--wandb-exp-name", default="", help="W&B run name (required with project)"),
        value("--wandb-save-dir", default="", help="W&B directory, default <save>/wandb"),
        value("--logging-level", type=int, help="Python logging level number"),
    ),
)
