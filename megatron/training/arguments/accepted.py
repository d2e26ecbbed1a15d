"""Flags that command lines carry but that change nothing here, or are another name for something else.

Giving one prints its notice once.  They all parse, so that launch scripts run unchanged.
"""

from argparse import Namespace
from dataclasses import dataclass

from megatron.training.arguments.flag import Flag, Group, off_switch, switch, value
from megatron.training.arguments.savings import lost_saving


@dataclass(frozen=True)
class Accepted:
    """Flags that share one notice.

    Attributes:
        notice: what the reader should know, after the name of the flag.
        flags: the flags.
        acts: the flag does have an effect, which the notice tells; the others never reach a config.
    """

    notice: str
    flags: tuple[Flag, ...]
    acts: bool = False


ACCEPTED = (
    Accepted(
        "there is no fused overlap of matmul and tensor-parallel traffic here; results are the same",
        (
            switch("--tp-comm-overlap", help="TE user-buffer overlap of TP collectives and GEMM"),
            value("--tp-comm-overlap-cfg", help="YAML for TE user buffers"),
            off_switch(
                "--disable-tp-comm-overlap-ag",
                "tp_comm_overlap_ag",
                help="TE user-buffer all-gather pipelining off",
            ),
            off_switch(
                "--disable-tp-comm-overlap-rs",
                "tp_comm_overlap_rs",
                help="TE user-buffer reduce-scatter pipelining off",
            ),
            switch("--tp-comm-overlap-rs-dgrad", help="TE user-buffer reduce-scatter with dgrad"),
            off_switch(
                "--disable-tp-comm-bulk-dgrad", "tp_comm_bulk_dgrad", help="TE bulk dgrad overlap off"
            ),
            off_switch(
                "--disable-tp-comm-bulk-wgrad", "tp_comm_bulk_wgrad", help="TE bulk wgrad overlap off"
            ),
            value(
                "--tp-comm-bootstrap-backend",
                default="nccl",
                choices=("nccl", "mpi", "gloo"),
                help="bootstrap transport of TE user buffers",
            ),
            off_switch("--disable-tp-comm-split-ag", "tp_comm_split_ag", help="old TE overlap switch"),
            off_switch("--disable-tp-comm-split-rs", "tp_comm_split_rs", help="old TE overlap switch"),
        ),
    ),
    Accepted(
        "under --sequence-parallel, kernels that send while they multiply serve where the device has them; "
        "results are the same",
        (switch("--use-ascend-mc2", help="fused TP matmul+collective ops"),),
        acts=True,
    ),
    Accepted(
        "products of tensor-parallel layers are cut into --coc-parallel-num chunks, one of which travels "
        "while the next is computed; results are the same within rounding",
        (switch("--use-ascend-coc", help="chunked TP communication"),),
        acts=True,
    ),
    Accepted(
        "process groups that NCCL carries take their settings from this file; other collectives have none",
        (value("--nccl-communicator-config-path", help="YAML of NCCL CTA limits"),),
        acts=True,
    ),
    Accepted(
        "buckets that ranks share end at multiples of 65536 elements; results are the same",
        (switch("--ddp-pad-buckets-for-high-nccl-busbw", help="pad buckets to multiples of 2^16"),),
        acts=True,
    ),
    Accepted(
        "there is no fp8 arithmetic here; the model runs in the parameter dtype",
        (
            value("--fp8-format", choices=("e4m3", "hybrid"), dest="fp8", help="TE fp8 training (dest fp8)"),
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
            switch("--fp8-param-gather", help="fp8 parameter gather"),
            switch("--first-last-layers-bf16", help="keep edge layers in bf16 under fp8"),
            value("--num-layers-at-start-in-bf16", type=int, default=1, help="edge layer count"),
            value("--num-layers-at-end-in-bf16", type=int, default=1, help="edge layer count"),
            switch("--keep-fp8-transpose-cache-when-using-custom-fsdp", help="fp8 detail of custom FSDP"),
        ),
    ),
    Accepted(
        "layers are not captured as graphs; they run eagerly",
        (
            switch("--enable-cuda-graph", help="capture layers as CUDA graphs"),
            value("--cuda-graph-warmup-steps", type=int, default=3, help="CUDA graph warmup"),
            switch("--external-cuda-graph", help="user-captured CUDA graphs"),
            value("--cuda-graph-scope", default="full", choices=("full", "attn"), help="what to capture"),
        ),
    ),
    Accepted(
        "this setting of the inference engine has no effect on training",
        (
            value(
                "--inference-batch-times-seqlen-threshold",
                type=int,
                default=-1,
                help="inference pipelining threshold",
            ),
            value("--max-tokens-to-oom", type=int, default=12000, help="text server guard"),
            switch("--flash-decode", help="decode kernel switch"),
            value(
                "--inference-max-requests",
                type=int,
                default=8,
                dest="inference_max_batch_size",
                help="inference batch limit (dest inference_max_batch_size)",
            ),
            value("--inference-max-seq-length", type=int, default=2560, help="inference length limit"),
            switch("--inference-dynamic-batching", help="dynamic batching engine"),
            value(
                "--inference-dynamic-batching-buffer-size-gb", type=float, default=40.0, help="engine buffer"
            ),
            value(
                "--inference-dynamic-batching-buffer-guaranteed-fraction",
                type=float,
                default=0.2,
                help="engine buffer",
            ),
            value("--inference-dynamic-batching-buffer-overflow-factor", type=float, help="engine buffer"),
            value("--inference-dynamic-batching-max-requests-override", type=int, help="engine limit"),
            value("--inference-dynamic-batching-max-tokens-override", type=int, help="engine limit"),
            switch("--inference-rng-tracker", help="no-op random tracker for inference"),
            switch("--output-bert-embeddings", help="embedding extraction mode of legacy BERT"),
            value(
                "--bert-embedder-type",
                default="megatron",
                choices=("megatron", "huggingface"),
                help="retro embedding source",
            ),
        ),
    ),
    Accepted(
        "withdrawn, and without effect: what it asked for is what always happens",
        (
            off_switch(
                "--no-async-tensor-model-parallel-allreduce",
                "async_tensor_model_parallel_allreduce",
                help="withdrawn; ignored upstream",
            ),
            switch(
                "--use-mcore-models",
                dest="deprecated_use_mcore_models",
                help="withdrawn; core models are the default",
            ),
            off_switch(
                "--no-scatter-gather-tensors-in-pipeline",
                "scatter_gather_tensors_in_pipeline",
                help="old pipeline optimisation switch",
            ),
            switch("--moe-extended-tp", help="withdrawn; use --expert-tensor-parallel-size"),
            switch("--use-dist-ckpt", dest="use_dist_ckpt_deprecated", help="withdrawn; ignored with a note"),
            value(
                "--dist-ckpt-format",
                dest="dist_ckpt_format_deprecated",
                help="withdrawn; ignored with a note",
            ),
            switch(
                "--ckpt-fully-parallel-save",
                dest="ckpt_fully_parallel_save_deprecated",
                help="withdrawn; already the default",
            ),
        ),
    ),
    Accepted(
        "there are no node-local checkpoints here, so this has no effect",
        (
            value("--non-persistent-local-ckpt-dir", help="directory of node-local checkpoints"),
            value(
                "--non-persistent-local-ckpt-algo",
                default="fully_parallel",
                choices=("fully_parallel", "atomic"),
                help="algorithm of node-local checkpoints",
            ),
            switch("--replication", help="replicate node-local checkpoints"),
            value("--replication-jump", type=int, help="rank distance of replicas"),
            value("--replication-factor", type=int, default=2, help="number of replicas"),
        ),
    ),
    Accepted(
        "the cluster service behind this flag is not part of this project; it has no effect",
        (
            switch("--adlr-autoresume", help="NVIDIA cluster requeue hook"),
            value("--adlr-autoresume-interval", type=int, default=1000, help="period of the requeue check"),
            switch("--run-workload-inspector-server", help="external profiling server"),
            off_switch("--no-one-logger", "enable_one_logger", help="turn NVIDIA one_logger off"),
            value("--one-logger-project", default="megatron-lm", help="one_logger project"),
            value("--one-logger-run-name", help="one_logger run"),
            switch("--one-logger-async", help="one_logger mode"),
            value("--app-tag-run-name", help="one_logger tag"),
            value("--app-tag-run-version", default="0.0.0", help="one_logger tag"),
            switch("--enable-ft-package", help="NVIDIA fault-tolerance client"),
            switch("--calc-ft-timeouts", help="fault-tolerance timeouts"),
        ),
    ),
    Accepted(
        "the library or torch build behind this flag is not used; the device's own communication is",
        (
            value(
                "--pipeline-model-parallel-comm-backend",
                choices=("nccl", "ucc"),
                help="separate backend for pipeline traffic (nccl/ucc)",
            ),
            switch("--use-ring-exchange-p2p", help="custom torch build feature"),
            off_switch(
                "--no-gradient-reduce-div-fusion", "gradient_reduce_div_fusion", help="custom FSDP detail"
            ),
            value("--suggested-communication-unit-size", type=int, help="custom FSDP message size"),
        ),
    ),
    Accepted(
        "asks for a faster kernel; the device's own is used where there is one, with the same result",
        (
            switch("--use-fused-rmsnorm", help="the device's fused RMSNorm"),
            switch("--use-fused-swiglu", help="the device's fused SwiGLU"),
            switch("--use-fused-rotary-pos-emb", help="the device's fused RoPE"),
            value(
                "--cross-entropy-fusion-impl",
                default="native",
                choices=("native", "te"),
                help="native or TE kernel for fused cross entropy",
            ),
            switch("--te-rng-tracker", help="TE random tracker"),
            switch("--disable-bf16-reduced-precision-matmul", help="cuBLAS switch for bf16 accumulation"),
            switch("--gemm-gradient-accumulation-fusion", help="wgrad accumulation fusion in grouped GEMM"),
            switch("--moe-permutation-async-comm", help="overlap the dispatcher's gathers"),
            switch("--moe-permute-fusion", help="TE fused token permutation"),
            switch("--moe-enable-deepep", help="DeepEP kernels for the flex dispatcher"),
            switch("--moe-use-legacy-grouped-gemm", help="older grouped GEMM class"),
            value("--cp-window-size", type=int, default=1, help="inner window of double-ring attention"),
            switch("--use-cp-send-recv-overlap", help="ring send/recv overlap"),
            switch("--megatron-cp-in-bnsd", help="layout of ring attention"),
        ),
    ),
    Accepted(
        "a memory saver that does not exist here: results are the same, memory use is not reduced",
        (
            switch("--reuse-fp32-param", help="share storage between bf16 params and fp32 masters"),
            switch("--swap-attention", help="offload attention activations"),
            switch("--recompute-activation-function", help="recompute MLP activation"),
        ),
    ),
    Accepted(
        "a choice of older model classes; here --no-bias-gelu-fusion makes it: GELU is exact with it, and "
        "in the tanh form without",
        (switch("--openai-gelu", help="tanh-style GELU of legacy models"),),
    ),
    Accepted(
        "written for older model classes or data formats; the models here do not need it",
        (
            value("--onnx-safe", type=bool, help="ONNX exporter workaround of legacy models"),
            value(
                "--sample-rate",
                type=float,
                default=1.0,
                help="fraction of training data for retrieval datasets",
            ),
            switch("--test-mode", help="run internal consistency checks during training"),
            switch(
                "--ckpt-convert-update-legacy-dist-opt-format",
                help="rewrite pre-2024 distributed optimizer files",
            ),
            value(
                "--optimization-level",
                type=int,
                default=2,
                choices=(0, 1, 2),
                help="how many MindSpeed patches to apply",
            ),
            value(
                "--data-impl",
                default="infer",
                choices=("lazy", "cached", "mmap", "infer"),
                help="indexed dataset flavour",
            ),
            value(
                "--DDP-impl",
                default="local",
                choices=("local", "torch"),
                help="choice of data-parallel wrapper",
            ),
        ),
    ),
    Accepted(
        "faults are only injected by the rerun engine, which is disabled",
        (
            value("--error-injection-rate", type=int, default=0, help="fault injection for the rerun engine"),
            value(
                "--error-injection-type",
                default="transient_error",
                choices=("correct_result", "transient_error", "persistent_error"),
                help="kind of injected fault",
            ),
        ),
    ),
    Accepted(
        "the allocator's history is kept and dumped where the device has one; elsewhere this has no effect",
        (
            switch("--record-memory-history", help="keep allocator history and dump a pickle"),
            value("--memory-snapshot-path", default="snapshot.pickle", help="file for the allocator history"),
        ),
        acts=True,
    ),
    Accepted(
        "process groups are made by the function that initialize_megatron returns",
        (value("--lazy-mpu-init", type=bool, help="delay parallel init for an external launcher"),),
        acts=True,
    ),
    Accepted(
        "the layout handed to the fused attention kernel; results are the same",
        (
            value(
                "--shape-order",
                default="SBH",
                choices=("SBH", "BSH", "BSND", "BNSD"),
                help="layout handed to the fused attention kernel",
            ),
        ),
        acts=True,
    ),
    Accepted(
        "the old name of --recompute-granularity full --recompute-method METHOD --recompute-num-layers 1",
        (
            value(
                "--activations-checkpoint-method",
                choices=("uniform", "block"),
                dest="recompute_method",
                help="old name of full recompute",
            ),
        ),
        acts=True,
    ),
    Accepted(
        "taken as --recompute-granularity selective --recompute-modules layernorm",
        (switch("--recompute-norm", help="recompute norms"),),
        acts=True,
    ),
    Accepted(
        "taken as --deterministic-mode",
        (switch("--npu-deterministic", help="deterministic kernels of the device"),),
        acts=True,
    ),
)

GROUP = Group("accepted without effect", tuple(flag for row in ACCEPTED for flag in row.flags))

INERT_DESTS = frozenset(flag.dest for row in ACCEPTED if not row.acts for flag in row.flags)


def notice_of(name: str, args: Namespace) -> str | None:
    """The line to print when the flag ``name`` is given, or None for a flag that simply works."""
    for row in ACCEPTED:
        if any(name in flag.names for flag in row.flags):
            return f"notice: {name}: {row.notice}{lost_saving(name, args)}"
    return None
