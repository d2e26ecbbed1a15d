"""What is saved, where, and how it is loaded."""

from megatron.training.arguments.flag import (
    Accepted,
    Group,
    NotBuilt,
    Refused,
    alike,
    always,
    at_least,
    need,
    off_switch,
    switch,
    unless,
    value,
    without,
)
from megatron.training.arguments.flags.shared import ALWAYS_SO, OLDER_CLASSES, WEIGHTS_ALONE, loads

NO_LOCAL_CHECKPOINTS = Accepted("there are no node-local checkpoints here, so this has no effect")
DISTRIBUTED_FORMAT = NotBuilt("the distributed checkpoint format")
ASYNC_SAVING = NotBuilt("asynchronous saving")
ROLLING_CHECKPOINTS = NotBuilt("rolling checkpoints", "use --save with --save-interval")
CONVERSION = NotBuilt("conversion between checkpoint formats")
WITHOUT_LOAD = without("--load", loads)

CHECKPOINTING = Group(
    "checkpointing",
    (
        value(
            "--save",
            needs=need("--save-interval", remedy="for example --save-interval 1000"),
            help="checkpoint output directory",
        ),
        value(
            "--save-interval",
            "--persistent-save-interval",
            type=int,
            bounds=at_least(1),
            no_effect=without("--save"),
            read="when a checkpoint is read or written",
            help="iterations between persistent checkpoints",
        ),
        switch(
            "--no-save-optim",
            default=None,
            no_effect=without("--save"),
            read="when a checkpoint is read or written",
            help="leave optimizer out of checkpoints",
        ),
        switch(
            "--no-save-rng",
            default=None,
            no_effect=without("--save"),
            read="when a checkpoint is read or written",
            help="leave RNG state out of checkpoints",
        ),
        value("--load", help="directory to resume from"),
        switch(
            "--no-load-optim",
            default=None,
            no_effect=(WITHOUT_LOAD, WEIGHTS_ALONE),
            help="do not restore the optimizer",
        ),
        switch(
            "--no-load-rng",
            default=None,
            no_effect=(WITHOUT_LOAD, WEIGHTS_ALONE),
            help="do not restore RNG state",
        ),
        value(
            "--non-persistent-save-interval",
            type=int,
            status=ROLLING_CHECKPOINTS,
            help="iterations between rolling checkpoints",
        ),
        value(
            "--non-persistent-ckpt-type",
            choices=("global", "local", "in_memory", None),
            status=(
                NotBuilt(
                    "rolling checkpoints",
                    "use --save with --save-interval",
                    asks=lambda kind: kind == "global",
                ),
                Refused(
                    "needs a package for node-local checkpoints that is not part of this project",
                    "leave it out and use --save with --save-interval",
                    values=("local", "in_memory"),
                ),
            ),
            help="kind of rolling checkpoint",
        ),
        value(
            "--non-persistent-global-ckpt-dir",
            status=ROLLING_CHECKPOINTS,
            help="directory of rolling checkpoints",
        ),
        switch("--finetune", no_effect=WITHOUT_LOAD, help="load weights only and restart at iteration 0"),
        value("--pretrained-checkpoint", help="weights to start from when --load has no checkpoint"),
        value(
            "--ckpt-step",
            type=int,
            bounds=at_least(0),
            no_effect=WITHOUT_LOAD,
            help="load this iteration instead of the latest",
        ),
        off_switch("--no-initialization", "perform_initialization", help="skip weight initialisation"),
        switch(
            "--use-checkpoint-args",
            needs=need(
                "--load",
                lambda a: a.load is not None or a.pretrained_checkpoint is not None,
                "add --load DIR",
            ),
            read="while they are completed from a checkpoint",
            help="take model arguments from the checkpoint",
        ),
        switch(
            "--use-mp-args-from-checkpoint-args",
            no_effect=without("--use-checkpoint-args"),
            read="while they are completed from a checkpoint",
            help="also take parallel sizes from the checkpoint",
        ),
        off_switch(
            "--no-use-tokenizer-model-from-checkpoint-args",
            "use_tokenizer_model_from_checkpoint_args",
            no_effect=without("--use-checkpoint-args"),
            read="while they are completed from a checkpoint",
            help="keep the command line tokenizer path",
        ),
        switch(
            "--exit-on-missing-checkpoint",
            no_effect=(
                WITHOUT_LOAD,
                unless(
                    lambda a: a.ckpt_step is None,
                    "a run without the checkpoint that --ckpt-step names ends anyway",
                ),
            ),
            read="when a checkpoint is read or written",
            help="stop when --load holds no checkpoint",
        ),
        switch(
            "--use-persistent-ckpt-worker", status=ASYNC_SAVING, help="one long-lived process for async saves"
        ),
        switch(
            "--auto-detect-ckpt-format",
            no_effect=always("the format of a checkpoint is always read from its directory"),
            help="detect legacy or distributed format on load",
        ),
        value(
            "--ckpt-format",
            default="torch_dist",
            choices=("torch", "torch_dist", "zarr", "torch_dcp"),
            status=NotBuilt(
                "this checkpoint format",
                "use --ckpt-format torch",
                asks=lambda kind: kind not in (None, "torch"),
            ),
            read="when a checkpoint is read or written",
            help="on-disk format: torch, torch_dist, zarr, torch_dcp",
        ),
        value(
            "--ckpt-convert-format",
            choices=("torch", "torch_dist", "zarr"),
            status=CONVERSION,
            help="convert the loaded checkpoint and exit",
        ),
        value("--ckpt-convert-save", status=CONVERSION, help="where the converted checkpoint goes"),
        off_switch(
            "--no-ckpt-fully-parallel-save",
            "ckpt_fully_parallel_save",
            no_effect=unless(
                lambda a: a.ckpt_format != "torch",
                "--ckpt-format torch writes each shard once, from data-parallel rank 0, already",
            ),
            help="let only DP rank 0 write shards",
        ),
        switch(
            "--ckpt-fully-parallel-save",
            dest="ckpt_fully_parallel_save_deprecated",
            status=ALWAYS_SO,
            help="withdrawn; already the default",
        ),
        switch("--async-save", default=None, status=ASYNC_SAVING, help="write checkpoints in the background"),
        switch(
            "--ckpt-fully-parallel-load",
            no_effect=unless(
                lambda a: a.ckpt_format != "torch",
                "in --ckpt-format torch every rank reads its own file; there is nothing to spread",
            ),
            help="spread checkpoint reading over DP ranks",
        ),
        switch(
            "--ckpt-assume-constant-structure",
            status=DISTRIBUTED_FORMAT,
            help="cache save plans between saves",
        ),
        value(
            "--dist-ckpt-strictness",
            default="assume_ok_unexpected",
            choices=(
                "assume_ok_unexpected",
                "log_unexpected",
                "log_all",
                "raise_unexpected",
                "raise_all",
                "return_unexpected",
                "return_all",
                "ignore_all",
            ),
            status=DISTRIBUTED_FORMAT,
            help="what to do on key mismatch in distributed load",
        ),
        switch(
            "--use-dist-ckpt",
            dest="use_dist_ckpt_deprecated",
            status=ALWAYS_SO,
            help="withdrawn; ignored with a note",
        ),
        value(
            "--dist-ckpt-format",
            dest="dist_ckpt_format_deprecated",
            status=ALWAYS_SO,
            help="withdrawn; ignored with a note",
        ),
        switch(
            "--ckpt-convert-update-legacy-dist-opt-format",
            status=OLDER_CLASSES,
            help="rewrite pre-2024 distributed optimizer files",
        ),
        *alike(
            NO_LOCAL_CHECKPOINTS,
            value("--non-persistent-local-ckpt-dir", help="directory of node-local checkpoints"),
            value(
                "--non-persistent-local-ckpt-algo",
                default="fully_parallel",
                choices=("fully_parallel", "atomic"),
                help="algorithm of node-local checkpoints",
            ),
            switch("--replication", help="replicate node-local checkpoints"),
            value("--replication-jump", type=int, help="rank distance of replicas"),
            value("--replication-factor", type=int, default=2, help="number of replicas"),
        ),
    ),
)
