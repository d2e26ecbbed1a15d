"""Gradient reduction, and what data-parallel ranks share."""

from megatron.training.arguments.flag import (
    Group,
    NotBuilt,
    Notice,
    Opponent,
    alike,
    at_least,
    need,
    off_switch,
    switch,
    value,
    without,
)
from megatron.training.arguments.flags.shared import OLDER_CLASSES, OTHER_LIBRARY, WITHOUT_REPLICAS

FULLY_SHARDED = NotBuilt("fully sharded data parallelism")

DATA_PARALLEL = Group(
    "data parallel",
    (
        switch(
            "--overlap-grad-reduce",
            no_effect=WITHOUT_REPLICAS,
            help="reduce gradient buckets during backward",
        ),
        off_switch(
            "--no-align-grad-reduce",
            "align_grad_reduce",
            no_effect=(
                without("--overlap-grad-reduce"),
                without(
                    "--pipeline-model-parallel-size 2 or more", lambda a: a.pipeline_model_parallel_size > 1
                ),
            ),
            read="in every step",
            help="let each stage start reductions on its own",
        ),
        value(
            "--ddp-num-buckets",
            type=int,
            bounds=at_least(1),
            opponents=Opponent("--ddp-bucket-size"),
            no_effect=(WITHOUT_REPLICAS, without("--overlap-grad-reduce")),
            help="number of gradient buckets",
        ),
        value(
            "--ddp-bucket-size",
            type=int,
            bounds=at_least(1),
            no_effect=(WITHOUT_REPLICAS, without("--overlap-grad-reduce")),
            help="elements per gradient bucket",
        ),
        switch(
            "--ddp-pad-buckets-for-high-nccl-busbw",
            status=Notice(
                "buckets that ranks share end at multiples of 65536 elements; results are the same"
            ),
            help="pad buckets to multiples of 2^16",
        ),
        switch(
            "--ddp-average-in-collective", no_effect=WITHOUT_REPLICAS, help="average inside the collective"
        ),
        switch(
            "--overlap-param-gather",
            needs=(
                need("--use-distributed-optimizer", remedy="add --use-distributed-optimizer"),
                need("--overlap-grad-reduce", remedy="add --overlap-grad-reduce"),
            ),
            no_effect=WITHOUT_REPLICAS,
            help="gather parameters during forward",
        ),
        switch(
            "--overlap-param-gather-with-optimizer-step",
            status=NotBuilt("gathering parameters during the optimizer's step"),
            help="gather first chunk during the step",
        ),
        off_switch(
            "--no-align-param-gather",
            "align_param_gather",
            no_effect=without(
                "--overlap-param-gather and virtual pipeline stages",
                lambda a: a.overlap_param_gather and a.virtual_pipeline_model_parallel_size,
            ),
            read="in every step",
            help="let each stage gather on its own",
        ),
        switch("--use-distributed-optimizer", help="shard optimizer state over DP"),
        value(
            "--num-distributed-optimizer-instances",
            type=int,
            default=1,
            status=NotBuilt("several copies of the sharded optimizer"),
            help="copies of the sharded optimizer over DP",
        ),
        *alike(
            FULLY_SHARDED,
            switch("--use-custom-fsdp", help="Megatron's own FSDP in the DDP class"),
            switch("--init-model-with-meta-device", help="build the model on the meta device"),
            value(
                "--data-parallel-sharding-strategy",
                default="no_shard",
                choices=("no_shard", "optim", "optim_grads", "optim_grads_params"),
                help="what custom FSDP shards",
            ),
            switch("--use-torch-fsdp2", help="PyTorch fully_shard instead of DDP"),
        ),
        off_switch(
            "--no-gradient-reduce-div-fusion",
            "gradient_reduce_div_fusion",
            status=OTHER_LIBRARY,
            help="custom FSDP detail",
        ),
        value(
            "--suggested-communication-unit-size",
            type=int,
            status=OTHER_LIBRARY,
            help="custom FSDP message size",
        ),
        value(
            "--DDP-impl",
            default="local",
            choices=("local", "torch"),
            status=OLDER_CLASSES,
            help="choice of data-parallel wrapper",
        ),
    ),
)
