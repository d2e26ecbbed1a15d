"""Size and shape of the model, its layers and its first weights."""

from megatron.training.arguments.flag import (
    Accepted,
    Group,
    NotBuilt,
    Notice,
    Opponent,
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
from megatron.training.arguments.flags.shared import (
    ALWAYS_SO,
    ENCODER_MODELS,
    OLDER_CLASSES,
    OWN_KERNEL,
    is_gated_by_flag,
)
from megatron.training.arguments.values import attention_backend

NO_LAYER_FILE = Refused(
    "per-layer architectures from a file are not part of this project", "give the sizes as flags"
)
OWN_LAYERS = unless(
    lambda a: a.spec is None or list(a.spec) == ["local"], "the layers are those that --spec names"
)
RELATIVE_BIAS = NotBuilt("relative position bias")

NETWORK = Group(
    "network size",
    (
        value(
            "--num-layers",
            type=int,
            bounds=at_least(1),
            most=10**6,
            help="depth of the (encoder or decoder-only) transformer; also fills encoder-num-layers",
        ),
        value(
            "--encoder-num-layers",
            type=int,
            bounds=at_least(1),
            most=10**6,
            read="while the arguments are checked",
            help="encoder depth for encoder-decoder models; stands in for --num-layers when that is absent",
        ),
        value(
            "--decoder-num-layers",
            type=int,
            status=ENCODER_MODELS,
            help="decoder depth for encoder-decoder models",
        ),
        value("--hidden-size", type=int, bounds=at_least(1), most=2**31 - 1, help="model width"),
        value("--ffn-hidden-size", type=int, bounds=at_least(1), most=2**31 - 1, help="MLP inner width"),
        value(
            "--num-attention-heads", type=int, bounds=at_least(1), most=10**6, help="number of query heads"
        ),
        value(
            "--attention-backend",
            type=attention_backend,
            default="auto",
            metavar="{flash,fused,unfused,local,auto}",
            help="pick the attention implementation (auto/flash/fused/unfused/local)",
        ),
        value("--kv-channels", type=int, bounds=at_least(1), most=2**31 - 1, help="per-head width"),
        switch(
            "--group-query-attention",
            no_effect=unless(
                lambda a: not a.multi_latent_attention, "latent attention has a key for every head"
            ),
            help="switch on grouped-query attention",
        ),
        value(
            "--num-query-groups",
            type=int,
            default=1,
            bounds=at_least(1),
            most=10**6,
            no_effect=without("--group-query-attention"),
            help="number of key/value heads when GQA is on",
        ),
        value(
            "--max-position-embeddings",
            type=int,
            bounds=at_least(1),
            most=2**31 - 1,
            help="rows of the learned position table and upper bound for sequence length",
        ),
        value(
            "--position-embedding-type",
            default="learned_absolute",
            choices=("learned_absolute", "rope", "mrope", "relative", "none"),
            status=(
                NotBuilt(
                    "relative position bias",
                    "use learned_absolute, rope or none",
                    asks=lambda kind: kind == "relative",
                ),
                Refused(
                    "multimodal models are not part of this project",
                    "use --position-embedding-type rope",
                    values=("mrope",),
                ),
            ),
            help="position encoding: learned table, RoPE, relative bias (T5), none; mrope is multimodal",
        ),
        value(
            "--relative-attention-num-buckets",
            type=int,
            default=32,
            status=RELATIVE_BIAS,
            help="bucket count for T5 relative bias",
        ),
        value(
            "--relative-attention-max-distance",
            type=int,
            default=128,
            status=RELATIVE_BIAS,
            help="distance at which T5 relative bias saturates",
        ),
        switch(
            "--use-rotary-position-embeddings", help="old switch for RoPE; sets position-embedding-type=rope"
        ),
        value(
            "--rotary-base",
            type=int,
            default=10000,
            bounds=at_least(1),
            no_effect=without("--position-embedding-type rope"),
            help="RoPE base frequency (integer)",
        ),
        value(
            "--rotary-percent",
            type=float,
            default=1.0,
            bounds=above(0, 1),
            no_effect=without("--position-embedding-type rope"),
            help="share of head width that is rotated",
        ),
        switch(
            "--rotary-interleaved",
            no_effect=without("--position-embedding-type rope"),
            help="rotate even/odd pairs instead of the two halves",
        ),
        value(
            "--rotary-seq-len-interpolation-factor",
            type=int,
            bounds=at_least(1),
            no_effect=without("--position-embedding-type rope"),
            help="linear position interpolation factor for RoPE",
        ),
        switch(
            "--use-rope-scaling",
            no_effect=without("--position-embedding-type rope"),
            help="Llama-3.x frequency rescaling of RoPE",
        ),
        value(
            "--rope-scaling-factor",
            type=float,
            default=8.0,
            bounds=above(0),
            no_effect=without("--use-rope-scaling"),
            help="factor used by Llama-3.x RoPE rescaling",
        ),
        value(
            "--mrope-section",
            type=int,
            nargs="+",
            status=Refused("multimodal models are not part of this project"),
            help="channel split for multimodal RoPE",
        ),
        off_switch(
            "--no-position-embedding",
            "add_position_embedding",
            no_effect=unless(
                lambda a: a.position_embedding_type not in ("rope", "none"),
                "this --position-embedding-type has no table of embeddings that could be left out",
            ),
            help="old switch off for position embeddings",
        ),
        value(
            "--make-vocab-size-divisible-by",
            type=int,
            default=128,
            bounds=at_least(1),
            most=2**31 - 1,
            help="padding unit of the vocabulary (times TP)",
        ),
        value(
            "--normalization",
            default="LayerNorm",
            choices=("LayerNorm", "RMSNorm"),
            help="LayerNorm or RMSNorm",
        ),
        value(
            "--norm-epsilon", type=float, default=1e-05, bounds=above(0), help="epsilon of every norm layer"
        ),
        switch("--apply-layernorm-1p", help="store norm scale as (gamma-1)"),
        switch(
            "--apply-residual-connection-post-layernorm",
            read="in forward",
            help="take the residual after the norm (original BERT order)",
        ),
        switch("--squared-relu", help="relu squared as MLP activation"),
        switch(
            "--openai-gelu",
            status=Accepted(
                "a choice of older model classes; here --no-bias-gelu-fusion makes it: GELU is exact with "
                "it, and "
                "in the tanh form without"
            ),
            no_effect=unless(
                lambda a: not (is_gated_by_flag(a) or a.squared_relu),
                "an MLP with --swiglu or --squared-relu has no GELU; --geglu and --gelu-tanh say which",
            ),
            help="tanh-style GELU of legacy models",
        ),
        switch("--swiglu", help="SiLU gated MLP"),
        off_switch(
            "--bert-no-binary-head",
            "bert_binary_head",
            status=ENCODER_MODELS,
            help="drop the BERT sentence-order head",
        ),
        switch(
            "--untie-embeddings-and-output-weights", help="separate output projection from input embedding"
        ),
        switch("--multi-latent-attention", help="DeepSeek style low-rank attention"),
        value(
            "--mtp-num-layers",
            type=int,
            bounds=at_least(0),
            most=10**6,
            needs=need(
                "--position-embedding-type rope",
                lambda a: not a.mtp_num_layers or a.position_embedding_type in ("rope", "none"),
                "add --position-embedding-type rope (or none), or leave it out",
            ),
            help="number of multi-token-prediction layers",
        ),
        value(
            "--mtp-loss-scaling-factor",
            type=float,
            default=0.1,
            bounds=at_least(0),
            no_effect=without("--mtp-num-layers"),
            help="weight of the averaged MTP loss",
        ),
        switch(
            "--mtp-after-norm",
            added=True,
            status=Accepted("it is the default; --mtp-before-norm is the other choice"),
            opponents=Opponent("--mtp-before-norm"),
            help="predict further tokens from the output of the final norm",
        ),
        switch(
            "--mtp-before-norm",
            added=True,
            no_effect=without("--mtp-num-layers"),
            help="predict further tokens from the input of the final norm, which is the default of "
            "MindSpeed-LLM",
        ),
        switch(
            "--qk-layernorm",
            no_effect=OWN_LAYERS,
            help="norm on queries and keys",
        ),
        switch(
            "--is-x-model",
            help="gated MLP whose --ffn-hidden-size counts both halves a, b; output a * gelu(b)",
        ),
        value(
            "--grok-preset",
            choices=("modellink", "grok1"),
            added=True,
            read="while the arguments are checked",
            help="sizes and layers of ModelLink's Grok-1 40B, or of the published Grok-1; flags given win",
        ),
        switch("--geglu", added=True, help="gated MLP: exact GELU of the first half times the second"),
        switch(
            "--gelu-tanh",
            added=True,
            help="gated MLP: GELU, in its tanh form, of the first half times the second",
        ),
        switch(
            "--post-norm",
            no_effect=OWN_LAYERS,
            help="extra norm after attention and after MLP, before the residual is added",
        ),
        value(
            "--embedding-multiplier-scale",
            type=float,
            default=1.0,
            bounds=above(0),
            read="in every step",
            help="multiply embedding output",
        ),
        value(
            "--output-multiplier-scale",
            type=float,
            bounds=above(0),
            read="in every step",
            help="multiply logits",
        ),
        value(
            "--attn-logit-softcapping",
            type=float,
            added=True,
            bounds=above(0),
            status=Notice(
                "scores are capped in fp32 in every --attention-backend; no fused kernel does that, so "
                "attention is computed block by block"
            ),
            help="C: attention scores x become C tanh(x/C), before the mask",
        ),
        value(
            "--output-logit-softcapping",
            type=float,
            added=True,
            bounds=above(0),
            read="in every step",
            help="C: logits x become C tanh(x/C), after their multiplier",
        ),
        value(
            "--noop-layers", status=NotBuilt("identity layers"), help="comma list of layers that do nothing"
        ),
        value(
            "--heterogeneous-layers-config-path",
            status=NO_LAYER_FILE,
            help="per-layer Nemotron-NAS config file",
        ),
        value(
            "--heterogeneous-layers-config-encoded-json",
            status=NO_LAYER_FILE,
            help="same config as a JSON string",
        ),
    ),
)

INITIALIZATION = Group(
    "initialization",
    (
        value("--seed", type=int, default=1234, bounds=at_least(1), help="base random seed, must be > 0"),
        switch(
            "--data-parallel-random-init",
            no_effect=without("several data-parallel ranks", lambda a: a.data_parallel_size > 1),
            help="different weight seed per DP rank, then broadcast",
        ),
        value(
            "--init-method-std",
            type=float,
            default=0.02,
            bounds=between(0, 1000),
            no_effect=unless(
                lambda a: not a.init_method_xavier_uniform,
                "--init-method-xavier-uniform draws weights by their shapes",
            ),
            help="std of the normal initialiser",
        ),
        switch("--init-method-xavier-uniform", help="Xavier-uniform instead of normal"),
        switch(
            "--use-cpu-initialization", default=None, help="draw the full weight on CPU and slice per TP rank"
        ),
        switch("--te-rng-tracker", status=OWN_KERNEL, help="TE random tracker"),
    ),
)

LATENT = Group(
    "mla",
    alike(
        without("--multi-latent-attention"),
        value(
            "--q-lora-rank",
            type=int,
            bounds=at_least(1),
            most=10**6,
            help="rank of the query compression; without it queries are not compressed",
        ),
        value(
            "--kv-lora-rank",
            type=int,
            default=32,
            bounds=at_least(1),
            most=10**6,
            help="rank of the key/value compression",
        ),
        value(
            "--qk-head-dim",
            type=int,
            default=128,
            bounds=at_least(1),
            most=10**6,
            help="non-rotary head width",
        ),
        value(
            "--qk-pos-emb-head-dim",
            type=int,
            default=64,
            bounds=at_least(2),
            most=10**6,
            help="rotary head width",
        ),
        value("--v-head-dim", type=int, default=128, bounds=at_least(1), most=10**6, help="value head width"),
        value("--rotary-scaling-factor", type=float, default=1.0, bounds=above(0), help="YaRN factor"),
        value("--mscale", type=float, default=1.0, bounds=at_least(0), help="YaRN magnitude scale"),
        value(
            "--mscale-all-dim",
            type=float,
            default=1.0,
            bounds=at_least(0),
            help="YaRN magnitude scale over all dims",
        ),
    ),
)

EXPERIMENTAL = Group(
    "experimental",
    (
        value(
            "--transformer-impl",
            default="transformer_engine",
            choices=("local", "transformer_engine"),
            no_effect=unless(lambda a: a.spec is None, "the layers are those that --spec names"),
            help="local modules or TransformerEngine modules",
        ),
        switch(
            "--use-mcore-models",
            dest="deprecated_use_mcore_models",
            status=ALWAYS_SO,
            help="withdrawn; core models are the default",
        ),
        switch(
            "--use-legacy-models",
            status=Refused("only the models of megatron.core exist here"),
            help="pre-core model classes",
        ),
        value(
            "--spec",
            nargs="*",
            help="module path and name of a layer/block spec, or the word local",
        ),
        value("--yaml-cfg", help="take all settings from a YAML file"),
        value(
            "--optimization-level",
            type=int,
            default=2,
            choices=(0, 1, 2),
            status=OLDER_CLASSES,
            help="how many MindSpeed patches to apply",
        ),
        value(
            "--onnx-safe", type=bool, status=OLDER_CLASSES, help="ONNX exporter workaround of legacy models"
        ),
    ),
)
