"""What is saved, where, and how it is loaded."""

from megatron.training.arguments.flag import Group, off_switch, switch, value

GROUP = Group(
    "checkpointing",
    (
        value("--save", help="checkpoint output directory"),
        value(
            "--save-interval",
            "--persistent-save-interval",
            type=int,
            help="iterations between persistent checkpoints",
        ),
        switch("--no-save-optim", default=None, help="leave optimizer out of checkpoints"),
        switch("--no-save-rng", default=None, help="leave RNG state out of checkpoints"),
        value("--load", help="directory to resume from"),
        switch("--no-load-optim", default=None, help="do not restore the optimizer"),
        switch("--no-load-rng", default=None, help="do not restore RNG state"),
        value("--non-persistent-save-interval", type=int, help="iterations between rolling checkpoints"),
        value(
            "--non-persistent-ckpt-type",
            choices=("global", "local", "in_memory", None),
            help="kind of rolling checkpoint",
        ),
        value("--non-persistent-global-ckpt-dir", help="directory of rolling checkpoints"),
        switch("--finetune", help="load weights only and restart at iteration 0"),
        value("--pretrained-checkpoint", help="weights to start from when --load has no checkpoint"),
        value("--ckpt-step", type=int, help="load this iteration instead of the latest"),
        off_switch("--no-initialization", "perform_initialization", help="skip weight initialisation"),
        switch("--use-checkpoint-args", help="take model arguments from the checkpoint"),
        switch("--use-mp-args-from-checkpoint-args", help="also take parallel sizes from the checkpoint"),
        off_switch(
            "--no-use-tokenizer-model-from-checkpoint-args",
            "use_tokenizer_model_from_checkpoint_args",
            help="keep the command line tokenizer path",
        ),
        switch("--exit-on-missing-checkpoint", help="stop when --load holds no checkpoint"),
        switch("--use-persistent-ckpt-worker", help="one long-lived process for async saves"),
        switch("--auto-detect-ckpt-format", help="detect legacy or distributed format on load"),
        value(
            "--ckpt-format",
            default="torch_dist",
            choices=("torch", "torch_dist", "zarr", "torch_dcp"),
            help="on-disk format: torch, torch_dist, zarr, torch_dcp",
        ),
        value(
            "--ckpt-convert-format",
            choices=("torch", "torch_dist", "zarr"),
            help="convert the loaded checkpoint and exit",
        ),
        value("--ckpt-convert-save", help="where the converted checkpoint goes"),
        off_switch(
            "--no-ckpt-fully-parallel-save",
            "ckpt_fully_parallel_save",
            help="let only DP rank 0 write shards",
        ),
        switch("--async-save", default=None, help="write checkpoints in the background"),
        switch("--ckpt-fully-parallel-load", help="spread checkpoint reading over DP ranks"),
        switch("--ckpt-assume-constant-structure", help="cache save plans between saves"),
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
            help="what to do on key mismatch in distributed load",
        ),
    ),
)
