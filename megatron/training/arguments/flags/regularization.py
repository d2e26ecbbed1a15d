"""Dropout, weight decay, clipping, optimizer coefficients."""

from megatron.training.arguments.flag import Group, value

GROUP = Group(
    "regularization",
    (
        value("--attention-dropout", type=float, default=0.1, help="dropout on attention probabilities"),
        value("--hidden-dropout", type=float, default=0.1, help="dropout on hidden states and embeddings"),
        value("--weight-decay", type=float, default=0.01, help="decoupled weight decay (constant style)"),
        value("--start-weight-decay", type=float, help="weight decay at step 0 for growing styles"),
        value("--end-weight-decay", type=float, help="weight decay at the end for growing styles"),
        value(
            "--weight-decay-incr-style",
            default="constant",
            choices=("constant", "linear", "cosine"),
            help="how weight decay grows (constant/linear/cosine)",
        ),
        value("--clip-grad", type=float, default=1.0, help="global L2 norm threshold; 0 disables clipping"),
        value("--adam-beta1", type=float, default=0.9, help="Adam first moment decay"),
        value("--adam-beta2", type=float, default=0.999, help="Adam second moment decay"),
        value("--adam-eps", type=float, default=1e-08, help="Adam epsilon"),
        value("--sgd-momentum", type=float, default=0.9, help="SGD momentum"),
    ),
)
