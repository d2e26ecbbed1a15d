"""Mixture of experts."""

from dataclasses import replace

from megatron.training.arguments.flag import (
    Alias,
    Flag,
    Group,
    NotBuilt,
    alike,
    at_least,
    need,
    off_switch,
    switch,
    unless,
    value,
    without,
)
from megatron.training.arguments.flags.shared import ALWAYS_SO, OWN_KERNEL
from megatron.training.arguments.values import moe_freq_type

EXPERTS = NotBuilt("mixture of experts")


def of_experts(*flags: Flag) -> tuple[Flag, ...]:
    """Flags that say something about experts, and nothing where there are none."""
    return tuple(replace(flag, no_effect=(without("--num-experts"), *flag.no_effect)) for flag in flags)


PARALLEL_AND_LAYERS = (
    value(
        "--expert-model-parallel-size",
        type=int,
        default=1,
        bounds=at_least(1),
        most=10**6,
        help="expert parallel degree",
    ),
    value(
        "--expert-tensor-parallel-size",
        type=int,
        most=10**6,
        no_effect=without("--num-experts", lambda a: a.num_experts or a.use_tp_pp_dp_mapping),
        help="TP degree inside experts",
    ),
    switch(
        "--moe-tp-extend-ep",
        status=Alias(
            "taken as --expert-tensor-parallel-size 1 and --expert-model-parallel-size times "
            "--tensor-model-parallel-size: whole experts, spread over the tensor-parallel ranks too"
        ),
        help="spread whole experts over tensor-parallel ranks as well",
    ),
    value(
        "--num-experts",
        type=int,
        status=NotBuilt("mixture of experts", asks=bool),
        help="experts per MoE layer (0 counts as unset)",
    ),
    *of_experts(
        value(
            "--moe-layer-freq",
            type=moe_freq_type,
            default=1,
            help="every N-th layer is MoE, or a 0/1 pattern expression",
        ),
        value("--first-k-dense-replace", type=int, bounds=at_least(-1), help="first k layers stay dense"),
        value(
            "--moe-ffn-hidden-size",
            "--moe-intermediate-size",
            type=int,
            bounds=at_least(1),
            help="expert inner width",
        ),
        value(
            "--moe-shared-expert-intermediate-size",
            type=int,
            bounds=at_least(1),
            help="total width of shared experts",
        ),
        value(
            "--n-shared-experts",
            type=int,
            bounds=at_least(0),
            help="shared experts, each as wide as a routed one",
        ),
        switch(
            "--shared-expert-gate",
            dest="moe_shared_expert_gate",
            needs=need(
                "shared experts",
                lambda a: a.moe_shared_expert_intermediate_size or not a.num_experts,
                "add --n-shared-experts or --moe-shared-expert-intermediate-size, or leave it out",
            ),
            help="multiply shared experts' output by a sigmoid of their input",
        ),
        switch(
            "--moe-shared-expert-overlap",
            no_effect=without(
                "shared experts (--n-shared-experts or --moe-shared-expert-intermediate-size)",
                lambda a: a.moe_shared_expert_intermediate_size,
            ),
            help="overlap shared experts with dispatch",
        ),
        switch("--moe-grouped-gemm", help="batch the experts' GEMMs"),
        switch(
            "--moe-use-legacy-grouped-gemm",
            no_effect=unless(
                lambda a: a.moe_grouped_gemm and a.transformer_impl == "transformer_engine",
                "it stores grouped experts in two weights with --moe-grouped-gemm --transformer-impl "
                "transformer_engine, which other layouts do or have no use for",
            ),
            help="older grouped GEMM class",
        ),
        switch("--moe-layer-recompute", help="recompute the whole MoE layer"),
        value(
            "--moe-token-dispatcher-type",
            default="allgather",
            choices=("allgather", "alltoall", "flex", "alltoall_seq"),
            help="allgather, alltoall, flex, alltoall_seq",
        ),
        switch(
            "--moe-pad-expert-input-to-capacity",
            help="pad every expert to capacity",
        ),
    ),
)

MOE = Group(
    "moe",
    (
        *PARALLEL_AND_LAYERS,
        *alike(
            EXPERTS,
            switch("--moe-use-upcycling", help="turn a dense checkpoint into MoE and save it"),
            value(
                "--moe-router-load-balancing-type",
                default="aux_loss",
                choices=("aux_loss", "seq_aux_loss", "sinkhorn", "none"),
                help="aux_loss, seq_aux_loss, sinkhorn, none",
            ),
            value("--moe-router-dtype", choices=("fp32", "fp64"), help="routing precision fp32/fp64"),
            value(
                "--moe-router-score-function",
                default="softmax",
                choices=("softmax", "sigmoid"),
                help="softmax or sigmoid scores",
            ),
            value("--moe-router-topk", type=int, default=2, help="experts per token"),
            switch("--moe-router-pre-softmax", help="softmax before the top-k"),
            value("--moe-router-num-groups", type=int, help="expert groups for limited routing"),
            value("--moe-router-group-topk", type=int, help="groups kept per token"),
            value("--moe-router-topk-scaling-factor", type=float, help="multiplier on routing probabilities"),
            switch("--moe-router-enable-expert-bias", help="bias-based balancing without aux loss"),
            value("--moe-router-bias-update-rate", type=float, default=0.001, help="step of the expert bias"),
            value("--moe-aux-loss-coeff", type=float, default=0.0, help="weight of the balancing loss"),
            value("--moe-z-loss-coeff", type=float, help="weight of the router z-loss"),
            value("--moe-input-jitter-eps", type=float, help="multiplicative input noise for the router"),
            switch("--moe-per-layer-logging", help="write MoE losses per layer to TensorBoard"),
            value("--moe-expert-capacity-factor", type=float, help="capacity per expert (unset = dropless)"),
            value(
                "--moe-token-drop-policy",
                default="probs",
                choices=("probs", "position"),
                help="drop by probability or position",
            ),
            off_switch(
                "--input-jitter", "input_jitter", help="naming trap: giving the flag turns router jitter OFF"
            ),
        ),
        switch("--moe-extended-tp", status=ALWAYS_SO, help="withdrawn; use --expert-tensor-parallel-size"),
        *alike(
            OWN_KERNEL,
            switch("--gemm-gradient-accumulation-fusion", help="wgrad accumulation fusion in grouped GEMM"),
            switch("--moe-permutation-async-comm", help="overlap the dispatcher's gathers"),
            switch("--moe-permute-fusion", help="TE fused token permutation"),
            switch("--moe-enable-deepep", help="DeepEP kernels for the flex dispatcher"),
        ),
    ),
)
