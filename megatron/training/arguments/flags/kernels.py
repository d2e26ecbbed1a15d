"""Fused kernels and the attention band."""

from megatron.training.arguments.flag import Group, off_switch, switch, value
from megatron.training.arguments.values import names_of_overrides

GROUP = Group(
    "kernels",
    (
        off_switch(
            "--no-masked-softmax-fusion", "masked_softmax_fusion", help="do not fuse scale+mask+softmax"
        ),
        off_switch("--no-bias-gelu-fusion", "bias_gelu_fusion", help="do not fuse bias+GELU"),
        off_switch("--no-bias-swiglu-fusion", "bias_swiglu_fusion", help="do not fuse bias+SwiGLU"),
        off_switch("--no-bias-dropout-fusion", "bias_dropout_fusion", help="do not fuse bias+dropout+add"),
        off_switch("--no-rope-fusion", "apply_rope_fusion", help="do not use fused RoPE"),
        switch("--cross-entropy-loss-fusion", help="fused vocabulary-parallel cross entropy"),
        switch("--use-flash-attn", help="ask for flash attention"),
        switch("--no-persist-layer-norm", help="do not use apex persistent layer norm"),
        off_switch(
            "--no-gradient-accumulation-fusion",
            "gradient_accumulation_fusion",
            help="do not fuse wgrad GEMM with accumulation",
        ),
        off_switch("--disable-bias-linear", "add_bias_linear", help="no bias in any linear layer"),
        switch("--add-qkv-bias", help="bias on the QKV projection only"),
        switch("--sequence-parallel", help="split norm/dropout activations along sequence in the TP group"),
        off_switch(
            "--no-clone-scatter-output-in-embedding",
            "clone_scatter_output_in_embedding",
            help="skip the memory-freeing clone after embedding scatter",
        ),
        value(
            "--pre-tockens",
            type=int,
            help="tokens before the query that attention may see (sliding window)",
        ),
        value("--next-tockens", type=int, help="tokens after the query that attention may see"),
        value(
            "--disable-override",
            type=names_of_overrides,
            help="NAME[,NAME...]: put the eager default of these device kernels back",
        ),
    ),
)
