"""The learning-rate schedule."""

from megatron.training.arguments.flag import Group, switch, value

GROUP = Group(
    "learning rate",
    (
        value("--lr", type=float, help="peak learning rate"),
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
            help="shape of the WSD cool-down",
        ),
        value("--lr-decay-iters", type=int, help="iterations over which the rate decays"),
        value("--lr-decay-samples", type=int, help="samples over which the rate decays"),
        value("--lr-wsd-decay-samples", type=int, help="length of the WSD cool-down in samples"),
        value("--lr-wsd-decay-iters", type=int, help="length of the WSD cool-down in iterations"),
        value("--lr-warmup-fraction", type=float, help="warmup as a fraction of the decay span"),
        value("--lr-warmup-iters", type=int, default=0, help="warmup iterations"),
        value("--lr-warmup-samples", type=int, default=0, help="warmup samples"),
        value("--lr-warmup-init", type=float, default=0.0, help="learning rate at step 0 of warmup"),
        value("--min-lr", type=float, default=0.0, help="floor of the learning rate"),
        switch("--override-opt_param-scheduler", help="ignore scheduler values of the checkpoint"),
        switch("--use-checkpoint-opt_param-scheduler", help="take scheduler values from the checkpoint"),
        value("--decoupled-lr", type=float, help="own peak rate for embedding and output layer"),
        value("--decoupled-min-lr", type=float, help="own floor for embedding and output layer"),
    ),
)
