"""Checks, profiling, memory, and what is printed and written to TensorBoard or W&B."""

from argparse import Namespace

from megatron.training.arguments.flag import (
    Accepted,
    Alias,
    Group,
    NotBuilt,
    Notice,
    alike,
    at_least,
    between,
    need,
    off_switch,
    switch,
    unless,
    value,
    without,
)
from megatron.training.arguments.flags.shared import OLDER_CLASSES, WITHOUT_REPLICAS


def _profile_window_is_reached(args: Namespace) -> bool:
    return not args.train_iters or args.profile_step_start < args.train_iters


def _has_device_memory() -> bool:
    from megatron.core import accelerator  # with torch, which tools that share these flags do not need

    return accelerator.is_accelerated()


NO_SUCH_SERVICE = Accepted(
    "the cluster service behind this flag is not part of this project; it has no effect"
)
NO_FAULTS = Accepted("faults are only injected by the rerun engine, which is disabled")
ALLOCATOR_HISTORY = Notice(
    "the allocator's history is kept and dumped where the device has one; elsewhere this has no effect"
)
WITHOUT_TENSORBOARD = without("--tensorboard-dir", lambda a: a.tensorboard_dir or a.wandb_project)

DIAGNOSTICS = Group(
    "diagnostics",
    (
        off_switch(
            "--no-check-for-nan-in-loss-and-grad",
            "check_for_nan_in_loss_and_grad",
            help="turn off NaN/Inf checks on loss and gradients",
        ),
        switch("--check-for-spiky-loss", read="in every step", help="flag losses > 10x the running max"),
        switch("--check-for-large-grads", read="in every step", help="flag gradients > 10x the running max"),
        value(
            "--check-weight-hash-across-dp-replicas-interval",
            type=int,
            bounds=at_least(1),
            no_effect=WITHOUT_REPLICAS,
            read="in every step",
            help="period of the replica hash check",
        ),
        value(
            "--rerun-mode",
            default="disabled",
            choices=("disabled", "validate_results", "report_stats"),
            status=NotBuilt("validation of results by rerunning them", "use --rerun-mode disabled"),
            help="validate results by rerunning an iteration",
        ),
        switch(
            "--deterministic-mode", read="while the arguments are checked", help="only deterministic kernels"
        ),
        switch(
            "--npu-deterministic",
            status=Alias("taken as --deterministic-mode"),
            help="deterministic kernels of the device",
        ),
        switch(
            "--profile",
            no_effect=unless(
                _profile_window_is_reached,
                "the run ends before the iteration --profile-step-start (10 unless given)",
            ),
            read="when a profile begins",
            help="profile a step range",
        ),
        value(
            "--profile-step-start",
            type=int,
            default=10,
            bounds=at_least(0),
            no_effect=without("--profile"),
            read="when a profile begins",
            help="first profiled iteration",
        ),
        value(
            "--profile-step-end",
            type=int,
            default=12,
            bounds=at_least(0),
            no_effect=without("--profile"),
            read="when a profile begins",
            help="iteration at which profiling stops",
        ),
        switch(
            "--use-pytorch-profiler",
            no_effect=without("--profile"),
            read="when a profile begins",
            help="use torch.profiler where the device has its own, too",
        ),
        value(
            "--profile-ranks",
            type=int,
            default=[0],
            nargs="+",
            no_effect=(
                without("--profile"),
                unless(
                    lambda a: any(0 <= rank < a.world_size for rank in a.profile_ranks),
                    "the run has none of these ranks",
                ),
            ),
            read="when a profile begins",
            help="global ranks to profile",
        ),
        value(
            "--empty-unused-memory-level",
            type=int,
            default=0,
            choices=(0, 1, 2),
            no_effect=unless(
                lambda a: a.empty_unused_memory_level == 0 or _has_device_memory(),
                "a CPU keeps no cache of device memory; nothing is held that could be released",
            ),
            read="in every step",
            help="how often to release cached device memory (0/1/2)",
        ),
        switch(
            "--manual-gc", read="in every step", help="collect garbage at fixed steps instead of by threshold"
        ),
        value(
            "--manual-gc-interval",
            type=int,
            default=0,
            bounds=at_least(0),
            no_effect=without("--manual-gc"),
            read="in every step",
            help="period of manual collection, 0 = only around evaluation",
        ),
        off_switch(
            "--no-manual-gc-eval",
            "manual_gc_eval",
            no_effect=without("--manual-gc"),
            read="in evaluation",
            help="no manual collection around evaluation",
        ),
        switch(
            "--log-straggler",
            read="when the first step begins",
            help="report the slowest and fastest ranks every --log-interval steps",
        ),
        switch(
            "--disable-straggler-on-startup",
            no_effect=without("--log-straggler"),
            read="when the first step begins",
            help="--log-straggler starts switched off",
        ),
        value(
            "--straggler-ctrlr-port",
            type=int,
            default=65535,
            bounds=between(0, 65535),
            no_effect=without("--log-straggler"),
            read="when the first step begins",
            help="port on rank 0's loopback interface that switches --log-straggler: curl 127.0.0.1:PORT",
        ),
        value(
            "--straggler-minmax-count",
            type=int,
            default=1,
            bounds=at_least(1),
            no_effect=without("--log-straggler"),
            read="when the first step begins",
            help="ranks that --log-straggler names",
        ),
        value("--config-logger-dir", default="", help="dump configs as JSON into this directory"),
        switch(
            "--record-memory-history",
            status=ALLOCATOR_HISTORY,
            help="keep allocator history and dump a pickle",
        ),
        value(
            "--memory-snapshot-path",
            default="snapshot.pickle",
            status=ALLOCATOR_HISTORY,
            help="file for the allocator history",
        ),
        value(
            "--error-injection-rate",
            type=int,
            default=0,
            status=NO_FAULTS,
            help="fault injection for the rerun engine",
        ),
        value(
            "--error-injection-type",
            default="transient_error",
            choices=("correct_result", "transient_error", "persistent_error"),
            status=NO_FAULTS,
            help="kind of injected fault",
        ),
        switch("--test-mode", status=OLDER_CLASSES, help="run internal consistency checks during training"),
    ),
)

LOGGING = Group(
    "logging",
    (
        value(
            "--log-arguments",
            added=True,
            default="changed",
            choices=("changed", "all", "none"),
            help="arguments to print at the start: those that differ from their defaults, all, or none",
        ),
        switch("--log-params-norm", read="in every step", help="print and record the parameter norm"),
        switch("--log-num-zeros-in-grad", read="in every step", help="record zeros in gradients"),
        switch("--log-throughput", read="when something is logged", help="print TFLOP/s per device"),
        switch("--log-progress", no_effect=without("--save"), help="append to <save>/progress.txt"),
        value("--timing-log-level", type=int, default=0, choices=(0, 1, 2), help="timer detail 0-2"),
        off_switch(
            "--no-barrier-with-level-1-timing",
            "barrier_with_L1_time",
            no_effect=without("--timing-log-level 1 or 2", lambda a: a.timing_log_level),
            read="in every step",
            help="no barrier around level-1 timers",
        ),
        value(
            "--timing-log-option",
            default="minmax",
            choices=("max", "minmax", "all"),
            help="max, minmax or all ranks",
        ),
        value(
            "--tensorboard-log-interval",
            type=int,
            default=1,
            bounds=at_least(1),
            no_effect=WITHOUT_TENSORBOARD,
            read="when something is logged",
            help="iterations between TensorBoard points",
        ),
        value(
            "--tensorboard-queue-size",
            type=int,
            default=1000,
            bounds=at_least(1),
            no_effect=without("--tensorboard-dir"),
            help="TensorBoard writer queue",
        ),
        switch(
            "--log-timers-to-tensorboard",
            no_effect=WITHOUT_TENSORBOARD,
            read="when something is logged",
            help="write timers, iteration time and throughput",
        ),
        off_switch(
            "--no-log-loss-scale-to-tensorboard",
            "log_loss_scale_to_tensorboard",
            no_effect=WITHOUT_TENSORBOARD,
            read="when something is logged",
            help="leave the loss scale out",
        ),
        switch(
            "--log-validation-ppl-to-tensorboard",
            no_effect=WITHOUT_TENSORBOARD,
            read="in evaluation",
            help="write validation perplexity",
        ),
        switch(
            "--log-memory-to-tensorboard",
            no_effect=WITHOUT_TENSORBOARD,
            read="when something is logged",
            help="write device memory statistics",
        ),
        switch(
            "--log-world-size-to-tensorboard",
            no_effect=WITHOUT_TENSORBOARD,
            read="when something is logged",
            help="write world size",
        ),
        value(
            "--wandb-project",
            default="",
            needs=need("--wandb-exp-name", remedy="add --wandb-exp-name NAME"),
            help="W&B project (enables W&B: figures, and checkpoints as artifacts)",
        ),
        value(
            "--wandb-exp-name",
            default="",
            no_effect=without("--wandb-project"),
            help="W&B run name (required with project)",
        ),
        value(
            "--wandb-save-dir",
            default="",
            no_effect=without("--wandb-project"),
            help="W&B directory, default <save>/wandb",
        ),
        value("--logging-level", type=int, help="Python logging level number"),
    ),
)

SERVICES = Group(
    "services of a cluster",
    alike(
        NO_SUCH_SERVICE,
        switch("--adlr-autoresume", help="NVIDIA cluster requeue hook"),
        value("--adlr-autoresume-interval", type=int, default=1000, help="period of the requeue check"),
        switch("--run-workload-inspector-server", help="external profiling server"),
        off_switch("--no-one-logger", "enable_one_logger", help="turn NVIDIA one_logger off"),
        value("--one-logger-project", default="megatron-lm", help="one_logger project"),
        value("--one-logger-run-name", help="one_logger run"),
        switch("--one-logger-async", help="one_logger mode"),
        value("--app-tag-run-name", help="one_logger tag"),
        value("--app-tag-run-version", default="0.0.0", help="one_logger tag"),
        switch("--enable-ft-package", help="NVIDIA fault-tolerance client"),
        switch("--calc-ft-timeouts", help="fault-tolerance timeouts"),
    ),
)
