"""Checks, profiling, memory, garbage collection."""

from megatron.training.arguments.flag import Group, off_switch, switch, value

GROUP = Group(
    "diagnostics",
    (
        off_switch(
            "--no-check-for-nan-in-loss-and-grad",
            "check_for_nan_in_loss_and_grad",
            help="turn off NaN/Inf checks on loss and gradients",
        ),
        switch("--check-for-spiky-loss", help="flag losses > 10x the running max"),
        switch("--check-for-large-grads", help="flag gradients > 10x the running max"),
        value(
            "--check-weight-hash-across-dp-replicas-interval",
            type=int,
            help="period of the replica hash check",
        ),
        value(
            "--rerun-mode",
            default="disabled",
            choices=("disabled", "validate_results", "report_stats"),
            help="validate results by rerunning an iteration",
        ),
        switch("--deterministic-mode", help="only deterministic kernels"),
        switch("--profile", help="profile a step range"),
        value("--profile-step-start", type=int, default=10, help="first profiled iteration"),
        value("--profile-step-end", type=int, default=12, help="iteration at which profiling stops"),
        switch(
            "--use-pytorch-profiler",
            help="use torch.profiler where the device has its own, too",
        ),
        value("--profile-ranks", type=int, default=[0], nargs="+", help="global ranks to profile"),
        value(
            "--empty-unused-memory-level",
            type=int,
            default=0,
            choices=(0, 1, 2),
            help="how often to release cached device memory (0/1/2)",
        ),
        switch("--manual-gc", help="collect garbage at fixed steps instead of by threshold"),
        value(
            "--manual-gc-interval",
            type=int,
            default=0,
            help="period of manual collection, 0 = only around evaluation",
        ),
        off_switch("--no-manual-gc-eval", "manual_gc_eval", help="no manual collection around evaluation"),
        switch("--log-straggler", help="report the slowest and fastest ranks every --log-interval steps"),
        switch("--disable-straggler-on-startup", help="--log-straggler starts switched off"),
        value(
            "--straggler-ctrlr-port",
            type=int,
            default=65535,
            help="port on rank 0's loopback interface that switches --log-straggler: curl 127.0.0.1:PORT",
        ),
        value("--straggler-minmax-count", type=int, default=1, help="ranks that --log-straggler names"),
        value("--config-logger-dir", default="", help="dump configs as JSON into this directory"),
    ),
)
