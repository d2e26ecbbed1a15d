"""Computing activations again in backward, fused kernels, the attention band, chunked communication."""

from megatron.training.arguments import savings
from megatron.training.arguments.flag import (
    Accepted,
    Alias,
    Group,
    Notice,
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
from megatron.training.arguments.flags.shared import (
    IN_FUSED_ATTENTION,
    NO_MEMORY_SAVER,
    OWN_KERNEL,
    is_gated_by_flag,
)
from megatron.training.arguments.values import names_of_overrides

NO_TE_OVERLAP = Accepted(
    "there is no fused overlap of matmul and tensor-parallel traffic here; results are the same"
)
NO_GRAPHS = Accepted("layers are not captured as graphs; they run eagerly")

RECOMPUTE = Group(
    "recompute",
    (
        switch("--recompute-activations", help="short form of selective recompute"),
        switch(
            "--checkpoint-activations",
            status=Withdrawn(
                "withdrawn",
                "use --recompute-activations, or --recompute-granularity full --recompute-method uniform",
            ),
            help="withdrawn recompute switch",
        ),
        value(
            "--recompute-granularity", choices=("full", "selective"), help="full layer or selective recompute"
        ),
        value(
            "--recompute-method",
            choices=("uniform", "block"),
            no_effect=without("--recompute-granularity"),
            read="in forward",
            help="uniform or block layer choice for full recompute",
        ),
        value(
            "--recompute-num-layers",
            type=int,
            bounds=at_least(1),
            no_effect=without("--recompute-granularity"),
            read="in forward",
            help="layers per unit (uniform) or per stage (block)",
        ),
        value(
            "--activations-checkpoint-method",
            choices=("uniform", "block"),
            dest="recompute_method",
            status=Alias(
                "the old name of --recompute-granularity full --recompute-method METHOD "
                "--recompute-num-layers 1"
            ),
            help="old name of full recompute",
        ),
        value(
            "--recompute-modules",
            nargs="*",
            no_effect=(
                without("--recompute-granularity"),
                unless(
                    lambda a: a.recompute_granularity == "selective",
                    "--recompute-granularity full computes whole layers again",
                ),
            ),
            help="which sub-modules selective recompute covers",
        ),
        switch(
            "--recompute-norm",
            status=Alias("taken as --recompute-granularity selective --recompute-modules layernorm"),
            help="recompute norms",
        ),
        switch(
            "--distribute-saved-activations",
            needs=(
                need(
                    "--tensor-model-parallel-size 2 or more",
                    lambda a: a.tensor_model_parallel_size > 1,
                    "leave it out",
                ),
                need(
                    "full recompute",
                    lambda a: a.recompute_granularity == "full",
                    "add --recompute-granularity full --recompute-method uniform",
                ),
            ),
            read="in forward",
            help="spread the recompute inputs over the TP group",
        ),
        switch(
            "--swap-attention",
            status=NO_MEMORY_SAVER,
            saving=savings.ATTENTION_ACTIVATIONS,
            help="offload attention activations",
        ),
        switch(
            "--recompute-activation-function",
            status=NO_MEMORY_SAVER,
            saving=savings.ACTIVATION_OUTPUTS,
            help="recompute MLP activation",
        ),
    ),
)

OVERLAP = Group(
    "overlap of tensor-parallel communication",
    alike(
        NO_TE_OVERLAP,
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
        off_switch("--disable-tp-comm-bulk-dgrad", "tp_comm_bulk_dgrad", help="TE bulk dgrad overlap off"),
        off_switch("--disable-tp-comm-bulk-wgrad", "tp_comm_bulk_wgrad", help="TE bulk wgrad overlap off"),
        value(
            "--tp-comm-bootstrap-backend",
            default="nccl",
            choices=("nccl", "mpi", "gloo"),
            help="bootstrap transport of TE user buffers",
        ),
        off_switch("--disable-tp-comm-split-ag", "tp_comm_split_ag", help="old TE overlap switch"),
        off_switch("--disable-tp-comm-split-rs", "tp_comm_split_rs", help="old TE overlap switch"),
    ),
)

KERNELS = Group(
    "kernels",
    (
        off_switch(
            "--no-masked-softmax-fusion",
            "masked_softmax_fusion",
            no_effect=IN_FUSED_ATTENTION,
            help="do not fuse scale+mask+softmax",
        ),
        off_switch(
            "--no-bias-gelu-fusion",
            "bias_gelu_fusion",
            no_effect=without(
                "a GELU with a bias: it chooses between the tanh form of GELU and the exact one",
                lambda a: not (is_gated_by_flag(a) or a.squared_relu) and a.add_bias_linear,
            ),
            help="do not fuse bias+GELU",
        ),
        off_switch(
            "--no-bias-swiglu-fusion",
            "bias_swiglu_fusion",
            no_effect=always(
                "the result is the same; --disable-override swiglu is what puts a device's kernel aside, "
                "where it has one"
            ),
            help="do not fuse bias+SwiGLU",
        ),
        off_switch(
            "--no-bias-dropout-fusion",
            "bias_dropout_fusion",
            no_effect=always(
                "bias, dropout and residual are one function with one result; "
                "--disable-override bias_dropout_add is what puts a device's kernel aside, where it has one"
            ),
            help="do not fuse bias+dropout+add",
        ),
        off_switch(
            "--no-rope-fusion",
            "apply_rope_fusion",
            no_effect=unless(
                lambda a: a.position_embedding_type == "rope" and a.rotary_interleaved,
                "the result is the same; --disable-override rotary is what puts a device's kernel aside, "
                "where it has one",
            ),
            read="while the arguments are checked",
            help="do not use fused RoPE",
        ),
        switch(
            "--cross-entropy-loss-fusion",
            no_effect=always("the loss is always computed in its fused form"),
            help="fused vocabulary-parallel cross entropy",
        ),
        switch("--use-flash-attn", help="ask for flash attention"),
        switch(
            "--no-persist-layer-norm",
            no_effect=always("norms have one form here; there is no persistent kernel to leave out"),
            help="do not use apex persistent layer norm",
        ),
        off_switch(
            "--no-gradient-accumulation-fusion",
            "gradient_accumulation_fusion",
            help="do not fuse wgrad GEMM with accumulation",
        ),
        off_switch("--disable-bias-linear", "add_bias_linear", help="no bias in any linear layer"),
        switch(
            "--add-qkv-bias",
            no_effect=without("--disable-bias-linear: all have a bias", lambda a: not a.add_bias_linear),
            help="bias on the QKV projection only",
        ),
        switch("--sequence-parallel", help="split norm/dropout activations along sequence in the TP group"),
        off_switch(
            "--no-clone-scatter-output-in-embedding",
            "clone_scatter_output_in_embedding",
            no_effect=without("--sequence-parallel"),
            read="in forward",
            help="skip the memory-freeing clone after embedding scatter",
        ),
        value(
            "--pre-tockens",
            type=int,
            bounds=at_least(0),
            no_effect=unless(
                lambda a: a.pre_tockens is None or a.seq_length is None or a.pre_tockens < a.seq_length - 1,
                "the window covers the whole sequence",
            ),
            read="in forward",
            read_as="window_size",
            help="tokens before the query that attention may see (sliding window)",
        ),
        value(
            "--next-tockens",
            type=int,
            bounds=at_least(0),
            no_effect=always("causal attention sees nothing after the query, whatever it says"),
            help="tokens after the query that attention may see",
        ),
        value(
            "--shape-order",
            default="SBH",
            choices=("SBH", "BSH", "BSND", "BNSD"),
            status=Notice("the layout handed to the fused attention kernel; results are the same"),
            help="layout handed to the fused attention kernel",
        ),
        value(
            "--disable-override",
            added=True,
            type=names_of_overrides,
            help="NAME[,NAME...]: put the eager default of these device kernels back",
        ),
        *alike(
            OWN_KERNEL,
            switch(
                "--use-fused-rmsnorm",
                needs=need("--normalization RMSNorm"),
                help="the device's fused RMSNorm",
            ),
            switch(
                "--use-fused-swiglu",
                needs=need("--swiglu", is_gated_by_flag),
                help="the device's fused SwiGLU",
            ),
            switch(
                "--use-fused-rotary-pos-emb",
                needs=need("--position-embedding-type rope"),
                help="the device's fused RoPE",
            ),
            value(
                "--cross-entropy-fusion-impl",
                default="native",
                choices=("native", "te"),
                help="native or TE kernel for fused cross entropy",
            ),
        ),
        *alike(
            NO_GRAPHS,
            switch("--enable-cuda-graph", help="capture layers as CUDA graphs"),
            value("--cuda-graph-warmup-steps", type=int, default=3, help="CUDA graph warmup"),
            switch("--external-cuda-graph", help="user-captured CUDA graphs"),
            value("--cuda-graph-scope", default="full", choices=("full", "attn"), help="what to capture"),
        ),
    ),
)
