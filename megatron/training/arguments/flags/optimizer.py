"""Which optimizer, and where its state lives."""

from megatron.training.arguments.flag import Group, off_switch, switch, value

GROUP = Group(
    "optimizer",
    (
        value("--optimizer", default="adam", choices=("adam", "sgd"), help="adam (AdamW) or sgd"),
        switch("--optimizer-cpu-offload", help="keep optimizer state and step on the host"),
        value("--optimizer-offload-fraction", type=float, default=1.0, help="share of state to offload"),
        switch("--use-torch-optimizer-for-cpu-offload", help="use torch optimizers in offload mode"),
        switch("--overlap-cpu-optimizer-d2h-h2d", help="overlap host step with copies"),
        off_switch("--no-pin-cpu-grads", "pin_cpu_grads", help="do not pin host gradients"),
        off_switch("--no-pin-cpu-params", "pin_cpu_params", help="do not pin host parameters"),
        switch("--use-precision-aware-optimizer", help="lower-precision optimizer state"),
        value(
            "--main-grads-dtype",
            default="fp32",
            choices=("fp32", "bf16"),
            help="dtype of main gradients (precision-aware only)",
        ),
        value(
            "--main-params-dtype",
            default="fp32",
            choices=("fp32", "fp16"),
            help="dtype of main parameters (precision-aware only)",
        ),
        value(
            "--exp-avg-dtype",
            default="fp32",
            choices=("fp32", "fp16", "fp8"),
            help="dtype of the first moment (precision-aware only)",
        ),
        value(
            "--exp-avg-sq-dtype",
            default="fp32",
            choices=("fp32", "fp16", "fp8"),
            help="dtype of the second moment (precision-aware only)",
        ),
    ),
)
