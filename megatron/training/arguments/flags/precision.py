"""16-bit training, loss scaling and fp8."""

from megatron.training.arguments import savings
from megatron.training.arguments.flag import (
    Accepted,
    Group,
    Opponent,
    above,
    alike,
    at_least,
    need,
    off_switch,
    switch,
    unless,
    value,
    without,
)
from megatron.training.arguments.flags.shared import IN_FUSED_ATTENTION, NO_MEMORY_SAVER, OWN_KERNEL

NO_FP8 = Accepted("there is no fp8 arithmetic here; the model runs in the parameter dtype")
WITHOUT_SEARCHED_SCALE = without(
    "--fp16 and a scale that is searched for (no --loss-scale)", lambda a: a.fp16 and a.loss_scale is None
)

PRECISION = Group(
    "mixed precision",
    (
        switch("--fp16", opponents=Opponent("--bf16"), help="train in fp16 with loss scaling"),
        switch("--bf16", help="train in bf16"),
        switch("--grad-reduce-in-bf16", no_effect=without("--bf16"), help="reduce gradients in bf16"),
        value(
            "--loss-scale",
            type=float,
            bounds=above(0, 2**32),
            no_effect=without("--fp16 or --bf16", lambda a: a.fp16 or a.bf16),
            help="static loss scale (unset = dynamic for fp16)",
        ),
        value(
            "--initial-loss-scale",
            type=float,
            default=4294967296.0,
            bounds=above(0),
            no_effect=WITHOUT_SEARCHED_SCALE,
            help="first dynamic scale",
        ),
        value(
            "--min-loss-scale",
            type=float,
            default=1.0,
            bounds=above(0),
            no_effect=WITHOUT_SEARCHED_SCALE,
            help="floor of the dynamic scale",
        ),
        value(
            "--loss-scale-window",
            type=float,
            default=1000.0,
            bounds=at_least(1),
            no_effect=WITHOUT_SEARCHED_SCALE,
            help="clean steps before the scale doubles",
        ),
        value(
            "--hysteresis",
            type=int,
            default=2,
            bounds=at_least(1),
            no_effect=WITHOUT_SEARCHED_SCALE,
            help="overflow credits before the scale halves",
        ),
        switch(
            "--fp32-residual-connection",
            needs=need("--fp16 or --bf16", lambda a: a.fp16 or a.bf16),
            read="in forward",
            help="keep the residual stream in fp32",
        ),
        switch(
            "--apply-query-key-layer-scaling",
            no_effect=IN_FUSED_ATTENTION,
            help="divide QK by layer number, undo in softmax",
        ),
        switch(
            "--attention-softmax-in-fp32",
            no_effect=(
                IN_FUSED_ATTENTION,
                unless(lambda a: a.fp16 or a.bf16, "without --fp16 or --bf16 the softmax is in fp32 anyway"),
            ),
            help="softmax in fp32",
        ),
        switch(
            "--accumulate-allreduce-grads-in-fp32",
            no_effect=(
                unless(lambda a: a.fp16 or a.bf16, "without --fp16 or --bf16 gradients are in fp32 anyway"),
                unless(
                    lambda a: not (a.bf16 and a.grad_reduce_in_bf16), "it gives way to --grad-reduce-in-bf16"
                ),
            ),
            help="fp32 gradient buffers",
        ),
        switch("--fp16-lm-cross-entropy", needs=need("--fp16"), help="cross entropy in fp16"),
        switch(
            "--reuse-fp32-param",
            status=NO_MEMORY_SAVER,
            needs=need("--bf16"),
            saving=savings.WEIGHT_COPY,
            help="share storage between bf16 params and fp32 masters",
        ),
        switch(
            "--disable-bf16-reduced-precision-matmul",
            status=OWN_KERNEL,
            help="cuBLAS switch for bf16 accumulation",
        ),
    ),
)

FP8 = Group(
    "fp8",
    alike(
        NO_FP8,
        value(
            "--fp8-format",
            choices=("e4m3", "hybrid"),
            dest="fp8",
            saving=savings.FP8_INPUTS,
            help="TE fp8 training (dest fp8)",
        ),
        value(
            "--fp8-recipe",
            default="delayed",
            choices=("tensorwise", "delayed", "mxfp8"),
            help="fp8 scaling recipe",
        ),
        value("--fp8-margin", type=int, default=0, help="fp8 margin"),
        value("--fp8-interval", type=int, default=1, help="withdrawn fp8 interval"),
        value("--fp8-amax-history-len", type=int, default=1, help="fp8 history"),
        value(
            "--fp8-amax-compute-algo",
            default="most_recent",
            choices=("most_recent", "max"),
            help="fp8 history rule",
        ),
        off_switch("--no-fp8-wgrad", "fp8_wgrad", help="fp8 wgrad off"),
        switch("--fp8-param-gather", saving=savings.FP8_WEIGHTS, help="fp8 parameter gather"),
        switch("--first-last-layers-bf16", help="keep edge layers in bf16 under fp8"),
        value("--num-layers-at-start-in-bf16", type=int, default=1, help="edge layer count"),
        value("--num-layers-at-end-in-bf16", type=int, default=1, help="edge layer count"),
        switch("--keep-fp8-transpose-cache-when-using-custom-fsdp", help="fp8 detail of custom FSDP"),
    ),
)
