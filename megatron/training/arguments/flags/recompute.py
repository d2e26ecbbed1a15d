"""Trade memory for time by computing activations again in backward."""

from megatron.training.arguments.flag import Group, switch, value

GROUP = Group(
    "recompute",
    (
        switch("--recompute-activations", help="short form of selective recompute"),
        value(
            "--recompute-granularity", choices=("full", "selective"), help="full layer or selective recompute"
        ),
        value(
            "--recompute-method",
            choices=("uniform", "block"),
            help="uniform or block layer choice for full recompute",
        ),
        value("--recompute-num-layers", type=int, help="layers per unit (uniform) or per stage (block)"),
        value("--recompute-modules", nargs="*", help="which sub-modules selective recompute covers"),
        switch("--distribute-saved-activations", help="spread the recompute inputs over the TP group"),
    ),
)
