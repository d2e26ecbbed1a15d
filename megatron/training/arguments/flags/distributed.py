"""Parallel sizes, process groups, gradient reduction."""

import os

from megatron.training.arguments.flag import Group, off_switch, switch, value


def local_rank_of_environment() -> int:
    """``LOCAL_RANK``, read when the parser is built; a word that is no number is reported later."""
    word = os.environ.get("LOCAL_RANK", "0")
    return int(word) if word.isdigit() else 0


GROUP = Group(
    "distributed",
    (
        value("--tensor-model-parallel-size", type=int, default=1, help="tensor parallel degree"),
        value(
            "--encoder-tensor-model-parallel-size",
            type=int,
            default=0,
            help="TP degree of a separate encoder",
        ),
        value(
            "--pipeline-model-parallel-size", type=int, default=1, help="pipeline parallel degree (decoder)"
        ),
        value(
            "--encoder-pipeline-model-parallel-size",
            type=int,
            default=0,
            help="extra pipeline stages for the encoder",
        ),
        value(
            "--pipeline-model-parallel-split-rank", type=int, help="old way to split encoder/decoder stages"
        ),
        value("--decoder-first-pipeline-num-layers", type=int, help="layers on the first stage"),
        value("--decoder-last-pipeline-num-layers", type=int, help="layers on the last stage"),
        value(
            "--num-layers-per-virtual-pipeline-stage",
            type=int,
            help="layers per virtual stage (interleaved schedule)",
        ),
        value("--num-virtual-stages-per-pipeline-rank", type=int, help="virtual stages per rank"),
        value(
            "--microbatch-group-size-per-virtual-pipeline-stage",
            type=int,
            dest="microbatch_group_size_per_vp_stage",
            help="microbatches issued back to back per virtual stage",
        ),
        value(
            "--pipeline-schedule",
            choices=("1f1b", "interleaved", "zb-h1"),
            help="order of forward and backward passes (default: interleaved with virtual stages, else "
            "1f1b); zb-h1 puts weight gradients into the bubble",
        ),
        off_switch(
            "--no-overlap-p2p-communication", "overlap_p2p_comm", help="do not overlap stage-to-stage sends"
        ),
        switch(
            "--overlap-p2p-communication-warmup-flush",
            dest="overlap_p2p_comm_warmup_flush",
            help="overlap sends in warmup and flush too",
        ),
        value(
            "--coc-parallel-num",
            type=int,
            default=4,
            choices=(1, 2, 4, 8),
            help="chunks of products of split layers with --use-ascend-coc: one travels while the next is "
            "computed; 1 leaves them whole",
        ),
        value("--distributed-backend", default="nccl", choices=("nccl", "gloo"), help="collective backend"),
        value(
            "--hccl-group-buffer",
            help="MB of each of the two communication buffers of process groups, for instance "
            "'dp:400;tp:300', where the device's collectives take such sizes",
        ),
        value("--distributed-timeout-minutes", type=int, default=10, help="collective timeout"),
        value(
            "--rendezvous-timeout",
            type=float,
            default=120.0,
            help="seconds that ranks wait for each other at the start before they say who is missing and end",
        ),
        switch("--overlap-grad-reduce", help="reduce gradient buckets during backward"),
        switch("--defer-embedding-wgrad-compute", help="move output-layer wgrad into the pipeline flush"),
        value("--wgrad-deferral-limit", type=int, default=0, help="how many micro-batches to defer"),
        off_switch(
            "--no-align-grad-reduce", "align_grad_reduce", help="let each stage start reductions on its own"
        ),
        value("--ddp-num-buckets", type=int, help="number of gradient buckets"),
        value("--ddp-bucket-size", type=int, help="elements per gradient bucket"),
        switch("--ddp-average-in-collective", help="average inside the collective"),
        switch("--overlap-param-gather", help="gather parameters during forward"),
        switch("--overlap-param-gather-with-optimizer-step", help="gather first chunk during the step"),
        off_switch("--no-align-param-gather", "align_param_gather", help="let each stage gather on its own"),
        value(
            "--local-rank",
            "--local_rank",
            type=int,
            default=local_rank_of_environment,
            help="device index on the node (default env LOCAL_RANK)",
        ),
        switch(
            "--account-for-embedding-in-pipeline-split",
            help="count the embedding as one layer when splitting",
        ),
        switch("--account-for-loss-in-pipeline-split", help="count the loss as one layer when splitting"),
        switch("--use-distributed-optimizer", help="shard optimizer state over DP"),
        switch("--use-custom-fsdp", help="Megatron's own FSDP in the DDP class"),
        switch("--init-model-with-meta-device", help="build the model on the meta device"),
        value(
            "--data-parallel-sharding-strategy",
            default="no_shard",
            choices=("no_shard", "optim", "optim_grads", "optim_grads_params"),
            help="what custom FSDP shards",
        ),
        value(
            "--num-distributed-optimizer-instances",
            type=int,
            default=1,
            help="copies of the sharded optimizer over DP",
        ),
        switch("--use-torch-fsdp2", help="PyTorch fully_shard instead of DDP"),
        value("--context-parallel-size", type=int, default=1, help="context parallel degree"),
        value(
            "--cp-comm-type", default=["p2p"], nargs="+", help="CP exchange scheme, one word or one per layer"
        ),
        value(
            "--hierarchical-context-parallel-sizes", type=int, nargs="+", help="inner/outer sizes for a2a+p2p"
        ),
        switch("--use-tp-pp-dp-mapping", help="rank order tp-cp-ep-pp-dp instead of tp-cp-ep-dp-pp"),
        switch("--no-shared-storage", help="every node has its own disk"),
        value(
            "--context-parallel-algo",
            choices=(
                "ulysses_cp_algo",
                "megatron_cp_algo",
                "hybrid_cp_algo",
                "adaptive_cp_algo",
                "hybrid_adaptive_cp_algo",
                "mamba_cp_algo",
            ),
            help="CP scheme",
        ),
        value("--ulysses-degree-in-cp", type=int, help="inner a2a degree of hybrid CP"),
        value(
            "--attention-mask-type",
            default="causal",
            choices=("causal", "general"),
            help="mask kind under CP",
        ),
        off_switch(
            "--disable-gloo-process-groups",
            "enable_gloo_process_groups",
            help="do not create CPU (gloo) side groups",
        ),
    ),
)
