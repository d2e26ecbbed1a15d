"""Size and shape of the model."""

from megatron.training.arguments.flag import Group, off_switch, switch, value
from megatron.training.arguments.values import attention_backend

GROUP = Group(
    "network size",
    (
        value(
            "--num-layers",
            type=int,
            help="depth of the (encoder or decoder-only) transformer; also fills encoder-num-layers",
        ),
        value(
            "--encoder-num-layers",
            type=int,
            help="encoder depth for encoder-decoder models; stands in for --num-layers when that is absent",
        ),
        value("--decoder-num-layers", type=int, help="decoder depth for encoder-decoder models"),
        value("--hidden-size", type=int, help="model width"),
        value("--ffn-hidden-size", type=int, help="MLP inner width"),
        value("--num-attention-heads", type=int, help="number of query heads"),
        value(
            "--attention-backend",
            type=attention_backend,
            default="auto",
            metavar="{flash,fused,unfused,local,auto}",
            help="pick the attention implementation (auto/flash/fused/unfused/local)",
        ),
        value("--kv-channels", type=int, help="per-head width"),
        switch("--group-query-attention", help="switch on grouped-query attention"),
        value("--num-query-groups", type=int, default=1, help="number of key/value heads when GQA is on"),
        value(
            "--max-position-embeddings",
            type=int,
            help="rows of the learned position table and upper bound for sequence length",
        ),
        value(
            "--position-embedding-type",
            default="learned_absolute",
            choices=("learned_absolute", "rope", "mrope", "relative", "none"),
            help="position encoding: learned table, RoPE, relative bias (T5), none; mrope is multimodal",
        ),
        value(
            "--relative-attention-num-buckets", type=int, default=32, help="bucket count for T5 relative bias"
        ),
        value(
            "--relative-attention-max-distance",
            type=int,
            default=128,
            help="distance at which T5 relative bias saturates",
        ),
        switch(
            "--use-rotary-position-embeddings", help="old switch for RoPE; sets position-embedding-type=rope"
        ),
        value("--rotary-base", type=int, default=10000, help="RoPE base frequency (integer)"),
        value("--rotary-percent", type=float, default=1.0, help="share of head width that is rotated"),
        switch("--rotary-interleaved", help="rotate even/odd pairs instead of the two halves"),
        value(
            "--rotary-seq-len-interpolation-factor",
            type=int,
            help="linear position interpolation factor for RoPE",
        ),
        switch("--use-rope-scaling", help="Llama-3.x frequency rescaling of RoPE"),
        value(
            "--rope-scaling-factor", type=float, default=8.0, help="factor used by Llama-3.x RoPE rescaling"
        ),
        off_switch(
            "--no-position-embedding", "add_position_embedding", help="old switch off for position embeddings"
        ),
        value(
            "--make-vocab-size-divisible-by",
            type=int,
            default=128,
            help="padding unit of the vocabulary (times TP)",
        ),
        value(
            "--normalization",
            default="LayerNorm",
            choices=("LayerNorm", "RMSNorm"),
            help="LayerNorm or RMSNorm",
        ),
        value("--norm-epsilon", type=float, default=1e-05, help="epsilon of every norm layer"),
        switch("--apply-layernorm-1p", help="store norm scale as (gamma-1)"),
        switch(
            "--apply-residual-connection-post-layernorm",
            help="take the residual after the norm (original BERT order)",
        ),
        switch("--squared-relu", help="relu squared as MLP activation"),
        switch("--swiglu", help="SiLU gated MLP"),
        off_switch("--bert-no-binary-head", "bert_binary_head", help="drop the BERT sentence-order head"),
        switch(
            "--untie-embeddings-and-output-weights", help="separate output projection from input embedding"
        ),
        switch("--multi-latent-attention", help="DeepSeek style low-rank attention"),
        value("--mtp-num-layers", type=int, help="number of multi-token-prediction layers"),
        value("--mtp-loss-scaling-factor", type=float, default=0.1, help="weight of the averaged MTP loss"),
        switch("--qk-layernorm", help="norm on queries and keys"),
        switch(
            "--is-x-model",
            help="gated MLP whose --ffn-hidden-size counts both halves a, b; output a * gelu(b)",
        ),
        switch("--post-norm", help="extra norm after attention and after MLP"),
        value("--embedding-multiplier-scale", type=float, default=1.0, help="multiply embedding output"),
        value("--output-multiplier-scale", type=float, help="multiply logits"),
        value("--noop-layers", help="comma list of layers that do nothing"),
    ),
)
