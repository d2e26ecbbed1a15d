"""Evaluation."""

from megatron.training.arguments.flag import Group, switch, value

GROUP = Group(
    "validation",
    (
        value("--eval-iters", type=int, default=100, help="batches per evaluation; 0 disables"),
        value("--eval-interval", type=int, default=1000, help="iterations between evaluations"),
        switch("--skip-train", help="only evaluate"),
    ),
)
