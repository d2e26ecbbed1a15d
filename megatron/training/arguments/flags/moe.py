"""Mixture of experts."""

from argparse import Namespace
from dataclasses import replace

from megatron.training.arguments.flag import (
    Accepted,
    Alias,
    Flag,
    Group,
    NoEffect,
    Refused,
    above,
    alike,
    at_least,
    between,
    need,
    off_switch,
    switch,
    unless,
    value,
    without,
)
from megatron.training.arguments.flags.shared import ALWAYS_SO, OWN_KERNEL
from megatron.training.arguments.values import moe_freq_type

NO_OVERLAP = Accepted(
    "tokens travel before and after the experts' matmuls, not beside them: results are the same"
)
SCORES_IN_FP32 = Accepted("scores are computed in fp32 through the top-k in any case")


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
        added=True,
        status=Alias(
            "taken as --expert-tensor-parallel-size 1 and --expert-model-parallel-size times "
            "--tensor-model-parallel-size: whole experts, spread over the tensor-parallel ranks too"
        ),
        help="spread whole experts over tensor-parallel ranks as well",
    ),
    value(
        "--num-experts",
        type=int,
        bounds=at_least(0),
        most=10**6,
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
            added=True,
            type=int,
            bounds=at_least(0),
            help="shared experts, each as wide as a routed one",
        ),
        switch(
            "--shared-expert-gate",
            added=True,
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
            read="in every step",
            help="pad every expert to capacity",
        ),
    ),
)


def _has_balancing_loss(args: Namespace) -> bool:
    kind = args.moe_router_load_balancing_type
    return kind not in ("none", "softmax_topk") or (kind == "none" and args.seq_aux)


def _of_type(*kinds: str) -> NoEffect:
    return without(
        f"--moe-router-load-balancing-type {' or '.join(kinds)}",
        lambda a: a.moe_router_load_balancing_type in kinds,
    )


def _not_of_type(*kinds: str) -> NoEffect:
    return NoEffect(
        lambda a: a.moe_router_load_balancing_type not in kinds,
        f" with --moe-router-load-balancing-type {' or '.join(kinds)}",
    )


# Kinds whose scores are a softmax over all experts, or the logits themselves.
_SCORES_ARE_FIXED = _not_of_type("softmax_topk", "pai_megatron_aux_loss", "group_limited_greedy", "sinkhorn")
_ONE_GROUP = _not_of_type("softmax_topk", "pai_megatron_aux_loss", "sinkhorn")


def _keeps_factor(args: Namespace) -> bool:
    """Whether weights are not divided by their sum after they are multiplied."""
    kind = args.moe_router_load_balancing_type
    many = kind == "aux_loss" or (kind == "group_limited_greedy" and args.moe_router_topk > 1)
    return not (args.norm_topk_prob and many)


_ROUTING = of_experts(
    value(
        "--moe-router-load-balancing-type",
        default="aux_loss",
        choices=(
            "aux_loss",
            "seq_aux_loss",
            "sinkhorn",
            "none",
            "softmax_topk",
            "pai_megatron_aux_loss",
            "group_limited_greedy",
            "sparsemixer_topk",
        ),
        status=Refused(
            "sparsemixer_topk draws experts at random, with a gradient of its own",
            "use aux_loss with --moe-router-topk 2",
            values=("sparsemixer_topk",),
        ),
        help="how experts are chosen and their loads kept even; softmax_topk, pai_megatron_aux_loss and "
        "group_limited_greedy are MindSpeed-LLM's",
    ),
    value("--moe-router-topk", type=int, default=2, bounds=at_least(1), most=10**6, help="experts per token"),
    value(
        "--moe-router-score-function",
        default="softmax",
        choices=("softmax", "sigmoid"),
        no_effect=_SCORES_ARE_FIXED,
        help="softmax or sigmoid scores",
    ),
    switch("--moe-router-pre-softmax", no_effect=_SCORES_ARE_FIXED, help="softmax before the top-k"),
    switch(
        "--norm-topk-prob",
        added=True,
        no_effect=_of_type("aux_loss", "softmax_topk", "group_limited_greedy"),
        help="divide the weights of a token's experts by their sum",
    ),
    value(
        "--moe-router-num-groups",
        type=int,
        bounds=at_least(1),
        most=10**6,
        no_effect=without("--moe-router-group-topk"),
        help="expert groups for limited routing",
    ),
    value(
        "--moe-router-group-topk",
        type=int,
        bounds=at_least(1),
        most=10**6,
        no_effect=_ONE_GROUP,
        help="groups kept per token",
    ),
    value(
        "--moe-router-topk-scaling-factor",
        type=float,
        bounds=above(0),
        no_effect=(_ONE_GROUP, unless(_keeps_factor, "--norm-topk-prob takes its place")),
        help="multiplier on routing probabilities",
    ),
    value("--moe-router-dtype", choices=("fp32", "fp64"), help="routing precision fp32/fp64"),
    switch("--moe-router-enable-expert-bias", help="bias-based balancing without aux loss"),
    value(
        "--moe-router-bias-update-rate",
        type=float,
        default=0.001,
        bounds=at_least(0),
        no_effect=without("--moe-router-enable-expert-bias"),
        help="step of the expert bias",
    ),
    value(
        "--moe-aux-loss-coeff",
        type=float,
        default=0.0,
        bounds=at_least(0),
        no_effect=unless(_has_balancing_loss, "this --moe-router-load-balancing-type has no loss"),
        help="weight of the balancing loss",
    ),
    switch(
        "--seq-aux",
        added=True,
        no_effect=_of_type("none", "group_limited_greedy"),
        help="balancing losses over each sequence, instead of none or of the micro-batch",
    ),
    value(
        "--moe-device-level-aux-loss-coeff",
        added=True,
        type=float,
        default=0.0,
        bounds=at_least(0),
        no_effect=_of_type("group_limited_greedy"),
        help="weight of the loss on the load of groups of experts",
    ),
    value(
        "--moe-comm-aux-loss-coeff",
        added=True,
        type=float,
        default=0.0,
        bounds=at_least(0),
        no_effect=_of_type("group_limited_greedy"),
        help="weight of the loss on the traffic to groups of experts",
    ),
    value("--moe-z-loss-coeff", type=float, bounds=at_least(0), help="weight of the router z-loss"),
    value(
        "--moe-input-jitter-eps",
        type=float,
        bounds=between(0, 1),
        help="multiplicative input noise for the router",
    ),
    switch(
        "--moe-router-force-load-balancing",
        added=True,
        help="give tokens to experts in turn, whatever the scores say; for benchmarks",
    ),
    value(
        "--moe-expert-capacity-factor",
        type=float,
        bounds=at_least(-1),
        help="capacity per expert over an even share (unset or negative: no token is dropped)",
    ),
    value(
        "--moe-token-drop-policy",
        default="probs",
        choices=("probs", "position"),
        no_effect=without("--moe-expert-capacity-factor"),
        help="drop by probability or position",
    ),
    switch("--moe-per-layer-logging", help="write MoE losses per layer to TensorBoard"),
    switch(
        "--log-moe-balance",
        added=True,
        help="print and write, for each layer, how evenly tokens were spread over experts since the last "
        "line, how many were dropped, and the router's entropy; warn of experts without tokens",
    ),
)

# Routers read all but these two in every pass, by way of the config.
_READ_WHEN_BUILT = ("--moe-router-load-balancing-type", "--moe-router-topk")
ROUTING = tuple(
    flag if flag.name in _READ_WHEN_BUILT else replace(flag, read="in every step") for flag in _ROUTING
)

ROUTING_NOTICES = (
    switch(
        "--router-gating-in-fp32",
        added=True,
        status=Alias("taken as --moe-router-dtype fp32"),
        help="compute the router's logits in fp32",
    ),
    switch(
        "--topk-softmax-in-fp32",
        added=True,
        status=SCORES_IN_FP32,
        help="keep scores in fp32 through the top-k",
    ),
    switch(
        "--moe-revert-type-after-topk",
        added=True,
        status=SCORES_IN_FP32,
        help="keep scores in fp32 through the top-k",
    ),
    off_switch(
        "--input-jitter",
        "input_jitter",
        status=Accepted("jitter follows --moe-input-jitter-eps alone"),
        help="naming trap: giving the flag turns router jitter OFF",
    ),
)

OVERLAPS = alike(
    NO_OVERLAP,
    switch("--moe-alltoall-overlap-comm", added=True, help="overlap the exchange of tokens with matmuls"),
    switch("--moe-allgather-overlap-comm", added=True, help="overlap the gathering of tokens with matmuls"),
    switch("--moe-fb-overlap", added=True, help="overlap one micro-batch's exchange with another's matmuls"),
    switch(
        "--moe-unperm2-mem-optim-swap",
        added=True,
        help="keep results of experts on the host under --moe-fb-overlap",
    ),
)

MOE = Group(
    "moe",
    (
        *PARALLEL_AND_LAYERS,
        *ROUTING,
        *ROUTING_NOTICES,
        *OVERLAPS,
        switch(
            "--moe-use-upcycling",
            needs=(
                need("--num-experts", lambda a: a.num_experts, "add it: the dense MLPs become experts"),
                need("--save", lambda a: a.save, "add --save DIRECTORY for the model with experts"),
                need(
                    "--load or --pretrained-checkpoint",
                    lambda a: a.load or a.pretrained_checkpoint,
                    "add --load DIRECTORY of the dense checkpoint",
                ),
            ),
            help="start from a dense checkpoint: its MLPs become experts; the result is saved as iteration 1",
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
