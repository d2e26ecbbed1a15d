"""Parallel sizes, pipeline schedule, process groups, context parallelism."""

import os
from argparse import Namespace

from megatron.core.pipeline_parallel.orders import SCHEDULES
from megatron.training.arguments.derive import EXCHANGES
from megatron.training.arguments.flag import (
    Accepted,
    Group,
    NotBuilt,
    Notice,
    Refused,
    Withdrawn,
    alike,
    always,
    at_least,
    need,
    off_switch,
    switch,
    unless,
    value,
    without,
)
from megatron.training.arguments.flags.shared import ALWAYS_SO, OTHER_LIBRARY, OWN_KERNEL


def local_rank_of_environment() -> int:
    """``LOCAL_RANK``, read when the parser is built; a word that is no number is reported later."""
    word = os.environ.get("LOCAL_RANK", "0")
    return int(word) if word.isdigit() else 0


def _spans_hosts(args: Namespace) -> bool:
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return args.world_size > 1 and (not here.isdigit() or int(here) < args.world_size)


def _takes_sizes_of_buffers() -> bool:
    from megatron.core import accelerator  # with torch, which tools that share these flags do not need

    return accelerator.companion("communicator_options") is not None


SEVERAL_STAGES = need(
    "several pipeline stages",
    lambda a: a.pipeline_model_parallel_size > 1,
    "leave it out, or use --pipeline-model-parallel-size 2 or more",
)
LATE_WEIGHT_GRADIENT = NotBuilt("a late weight gradient of the output layer")
ENCODER_RANKS = NotBuilt("an encoder on ranks of its own")
WITHOUT_CONTEXT_RANKS = without("--context-parallel-size 2 or more", lambda a: a.context_parallel_size > 1)
WITHOUT_TWO_LEVELS = without(
    "--cp-comm-type a2a+p2p (or --context-parallel-algo hybrid_cp_algo)",
    lambda a: "a2a+p2p" in a.cp_comm_type,
)
WITHOUT_STAGES = without(
    "--pipeline-model-parallel-size 2 or more", lambda a: a.pipeline_model_parallel_size > 1
)

DISTRIBUTED = Group(
    "distributed",
    (
        value(
            "--tensor-model-parallel-size",
            type=int,
            default=1,
            bounds=at_least(1),
            most=10**6,
            help="tensor parallel degree",
        ),
        value(
            "--model-parallel-size",
            type=int,
            status=Withdrawn("withdrawn", "use --tensor-model-parallel-size"),
            help="withdrawn tensor-parallel argument",
        ),
        value(
            "--encoder-tensor-model-parallel-size",
            type=int,
            default=0,
            status=ENCODER_RANKS,
            help="TP degree of a separate encoder",
        ),
        value(
            "--pipeline-model-parallel-size",
            type=int,
            default=1,
            bounds=at_least(1),
            most=10**6,
            help="pipeline parallel degree (decoder)",
        ),
        value(
            "--encoder-pipeline-model-parallel-size",
            type=int,
            default=0,
            status=ENCODER_RANKS,
            help="extra pipeline stages for the encoder",
        ),
        value(
            "--pipeline-model-parallel-split-rank",
            type=int,
            status=ENCODER_RANKS,
            help="old way to split encoder/decoder stages",
        ),
        value(
            "--decoder-first-pipeline-num-layers",
            type=int,
            most=10**6,
            needs=SEVERAL_STAGES,
            help="layers on the first stage",
        ),
        value(
            "--decoder-last-pipeline-num-layers",
            type=int,
            most=10**6,
            needs=SEVERAL_STAGES,
            help="layers on the last stage",
        ),
        value(
            "--num-layers-per-virtual-pipeline-stage",
            type=int,
            most=10**6,
            help="layers per virtual stage (interleaved schedule)",
        ),
        value("--num-virtual-stages-per-pipeline-rank", type=int, most=10**6, help="virtual stages per rank"),
        value(
            "--microbatch-group-size-per-virtual-pipeline-stage",
            type=int,
            dest="microbatch_group_size_per_vp_stage",
            most=10**6,
            read="by the pipeline's schedule",
            help="microbatches issued back to back per virtual stage",
        ),
        value(
            "--pipeline-schedule",
            added=True,
            choices=SCHEDULES,
            read="by the pipeline's schedule",
            help="order of forward and backward passes (default: interleaved with virtual stages, else "
            "1f1b); zb-h1 puts weight gradients into the bubble",
        ),
        off_switch(
            "--no-overlap-p2p-communication",
            "overlap_p2p_comm",
            no_effect=without(
                "virtual pipeline stages: without them nothing overlaps",
                lambda a: a.virtual_pipeline_model_parallel_size,
            ),
            help="do not overlap stage-to-stage sends",
        ),
        switch(
            "--overlap-p2p-communication-warmup-flush",
            dest="overlap_p2p_comm_warmup_flush",
            status=NotBuilt("overlapping the warm-up and the end of a pipeline"),
            help="overlap sends in warmup and flush too",
        ),
        value(
            "--coc-parallel-num",
            added=True,
            type=int,
            default=4,
            choices=(1, 2, 4, 8),
            no_effect=without("--use-ascend-coc"),
            help="chunks of the matmuls of split layers with --use-ascend-coc: one travels while the next is "
            "computed; 1 leaves them whole",
        ),
        switch(
            "--use-ascend-mc2",
            status=Notice(
                "under --sequence-parallel, kernels that send while they multiply serve where the device "
                "has them; "
                "results are the same"
            ),
            no_effect=without(
                "--sequence-parallel and --tensor-model-parallel-size 2 or more",
                lambda a: a.sequence_parallel and a.tensor_model_parallel_size > 1,
            ),
            help="fused TP matmul+collective ops",
        ),
        switch(
            "--use-mc2",
            added=True,
            status=Accepted(
                "ModelLink, which it is from, switches it off again; --use-ascend-mc2 asks for kernels that "
                "send while they multiply"
            ),
            help="older name of fused TP matmul+collective ops",
        ),
        switch(
            "--use-ascend-coc",
            status=Notice(
                "matmuls of tensor-parallel layers are cut into --coc-parallel-num chunks, one of which "
                "travels "
                "while the next is computed; results are the same within rounding"
            ),
            no_effect=without(
                "--tensor-model-parallel-size 2 or more", lambda a: a.tensor_model_parallel_size > 1
            ),
            help="chunked TP communication",
        ),
        value("--distributed-backend", default="nccl", choices=("nccl", "gloo"), help="collective backend"),
        value(
            "--hccl-group-buffer",
            added=True,
            no_effect=without(
                "a device whose collectives take sizes of buffers", lambda a: _takes_sizes_of_buffers()
            ),
            help="MB of each of the two communication buffers of process groups, for instance "
            "'dp:400;tp:300', where the device's collectives take such sizes",
        ),
        value(
            "--nccl-communicator-config-path",
            status=Notice(
                "process groups that NCCL carries take their settings from this file; other collectives "
                "have none"
            ),
            help="YAML of NCCL CTA limits",
        ),
        value(
            "--distributed-timeout-minutes",
            type=int,
            default=10,
            bounds=at_least(1),
            most=10**6,
            help="collective timeout",
        ),
        value(
            "--rendezvous-timeout",
            added=True,
            type=float,
            default=120.0,
            bounds=at_least(1),
            no_effect=without("other ranks to meet", lambda a: a.world_size > 1),
            read="when ranks meet, which may be over",
            help="seconds that ranks wait for each other at the start before they say who is missing and end",
        ),
        value(
            "--lazy-mpu-init",
            type=bool,
            status=Notice("process groups are made by the function that initialize_megatron returns"),
            help="delay parallel init for an external launcher",
        ),
        switch(
            "--defer-embedding-wgrad-compute",
            status=LATE_WEIGHT_GRADIENT,
            help="move output-layer wgrad into the pipeline flush",
        ),
        value(
            "--wgrad-deferral-limit",
            type=int,
            default=0,
            status=LATE_WEIGHT_GRADIENT,
            help="how many micro-batches to defer",
        ),
        value(
            "--local-rank",
            "--local_rank",
            type=int,
            default=local_rank_of_environment,
            bounds=at_least(0),
            help="device index on the node (default env LOCAL_RANK)",
        ),
        switch(
            "--account-for-embedding-in-pipeline-split",
            no_effect=WITHOUT_STAGES,
            help="count the embedding as one layer when splitting",
        ),
        switch(
            "--account-for-loss-in-pipeline-split",
            no_effect=WITHOUT_STAGES,
            help="count the loss as one layer when splitting",
        ),
        value(
            "--context-parallel-size",
            type=int,
            default=1,
            bounds=at_least(1),
            most=10**6,
            help="context parallel degree",
        ),
        value(
            "--cp-comm-type",
            default=["p2p"],
            nargs="+",
            no_effect=WITHOUT_CONTEXT_RANKS,
            help="CP exchange scheme, one word or one per layer",
        ),
        value(
            "--hierarchical-context-parallel-sizes",
            type=int,
            nargs="+",
            no_effect=WITHOUT_TWO_LEVELS,
            help="inner/outer sizes for a2a+p2p",
        ),
        switch(
            "--use-tp-pp-dp-mapping",
            no_effect=without(
                "several pipeline stages and several data-parallel ranks, whose order it swaps",
                lambda a: a.pipeline_model_parallel_size > 1 and a.data_parallel_size > 1,
            ),
            help="rank order tp-cp-ep-pp-dp instead of tp-cp-ep-dp-pp",
        ),
        switch(
            "--no-shared-storage",
            no_effect=without("ranks on several hosts", _spans_hosts),
            help="every node has its own disk",
        ),
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
            status=Refused(
                "this context-parallel scheme is not part of this project",
                "use ulysses_cp_algo, megatron_cp_algo or hybrid_cp_algo",
                values=("adaptive_cp_algo", "hybrid_adaptive_cp_algo", "mamba_cp_algo"),
            ),
            no_effect=(
                WITHOUT_CONTEXT_RANKS,
                unless(
                    lambda a: EXCHANGES.get(a.context_parallel_algo) in (None, *a.cp_comm_type),
                    "it gives way to --cp-comm-type",
                ),
            ),
            help="CP scheme",
        ),
        value(
            "--ulysses-degree-in-cp",
            type=int,
            most=10**6,
            no_effect=(WITHOUT_CONTEXT_RANKS, WITHOUT_TWO_LEVELS),
            help="inner a2a degree of hybrid CP",
        ),
        value(
            "--attention-mask-type",
            default="causal",
            choices=("causal", "general"),
            no_effect=(
                WITHOUT_CONTEXT_RANKS,
                always(
                    "attention is causal, and obeys the mask of the batch where --reset-attention-mask "
                    "makes one"
                ),
            ),
            help="mask kind under CP",
        ),
        off_switch(
            "--disable-gloo-process-groups",
            "enable_gloo_process_groups",
            help="do not create CPU (gloo) side groups",
        ),
        off_switch(
            "--no-async-tensor-model-parallel-allreduce",
            "async_tensor_model_parallel_allreduce",
            status=ALWAYS_SO,
            help="withdrawn; ignored upstream",
        ),
        off_switch(
            "--no-scatter-gather-tensors-in-pipeline",
            "scatter_gather_tensors_in_pipeline",
            status=ALWAYS_SO,
            help="old pipeline optimisation switch",
        ),
        value(
            "--pipeline-model-parallel-comm-backend",
            choices=("nccl", "ucc"),
            status=OTHER_LIBRARY,
            help="separate backend for pipeline traffic (nccl/ucc)",
        ),
        switch("--use-ring-exchange-p2p", status=OTHER_LIBRARY, help="custom torch build feature"),
        *alike(
            OWN_KERNEL,
            value("--cp-window-size", type=int, default=1, help="inner window of double-ring attention"),
            switch("--use-cp-send-recv-overlap", help="ring send/recv overlap"),
            switch("--megatron-cp-in-bnsd", help="layout of ring attention"),
        ),
    ),
)
