"""16-bit training and loss scaling."""

from megatron.training.arguments.flag import Group, switch, value

GROUP = Group(
    "mixed precision",
    (
        switch("--fp16", help="train in fp16 with loss scaling"),
        switch("--bf16", help="train in bf16"),
        switch("--grad-reduce-in-bf16", help="reduce gradients in bf16"),
        value("--loss-scale", type=float, help="static loss scale (unset = dynamic for fp16)"),
        value("--initial-loss-scale", type=float, default=4294967296.0, help="first dynamic scale"),
        value("--min-loss-scale", type=float, default=1.0, help="floor of the dynamic scale"),
        value("--loss-scale-window", type=float, default=1000.0, help="clean steps before the scale doubles"),
        value("--hysteresis", type=int, default=2, help="overflow credits before the scale halves"),
        switch("--fp32-residual-connection", help="keep the residual stream in fp32"),
        switch("--apply-query-key-layer-scaling", help="divide QK by layer number, undo in softmax"),
        switch("--attention-softmax-in-fp32", help="softmax in fp32"),
        switch("--accumulate-allreduce-grads-in-fp32", help="fp32 gradient buffers"),
        switch("--fp16-lm-cross-entropy", help="cross entropy in fp16"),
    ),
)
