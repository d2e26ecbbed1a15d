"""Random seeds and initial weights."""

from megatron.training.arguments.flag import Group, switch, value

GROUP = Group(
    "initialization",
    (
        value("--seed", type=int, default=1234, help="base random seed, must be > 0"),
        switch("--data-parallel-random-init", help="different weight seed per DP rank, then broadcast"),
        value("--init-method-std", type=float, default=0.02, help="std of the normal initialiser"),
        switch("--init-method-xavier-uniform", help="Xavier-uniform instead of normal"),
        switch(
            "--use-cpu-initialization", default=None, help="draw the full weight on CPU and slice per TP rank"
        ),
    ),
)
