"""Inference settings, which training accepts, and flags of models that are not part of this project."""

from megatron.training.arguments.flag import Accepted, Group, Refused, off_switch, switch, value

INFERENCE_SETTING = Accepted("this setting of the inference engine has no effect on training")
NO_RETRIEVAL = Refused("retrieval models (ICT, REALM, biencoders) are not part of this project")
NO_VISION = Refused("vision models are not part of this project")
NO_RETRO = Refused("retrieval-enhanced (Retro) models are not part of this project")
NO_STATE_SPACE = Refused("state-space (Mamba) and hybrid models are not part of this project")

INFERENCE = Group(
    "inference",
    (
        value(
            "--inference-batch-times-seqlen-threshold",
            type=int,
            default=-1,
            status=INFERENCE_SETTING,
            help="inference pipelining threshold",
        ),
        value(
            "--max-tokens-to-oom", type=int, default=12000, status=INFERENCE_SETTING, help="text server guard"
        ),
        switch("--flash-decode", status=INFERENCE_SETTING, help="decode kernel switch"),
        value(
            "--inference-max-requests",
            type=int,
            default=8,
            dest="inference_max_batch_size",
            status=INFERENCE_SETTING,
            help="inference batch limit (dest inference_max_batch_size)",
        ),
        value(
            "--inference-max-seq-length",
            type=int,
            default=2560,
            status=INFERENCE_SETTING,
            help="inference length limit",
        ),
        switch("--inference-dynamic-batching", status=INFERENCE_SETTING, help="dynamic batching engine"),
        value(
            "--inference-dynamic-batching-buffer-size-gb",
            type=float,
            default=40.0,
            status=INFERENCE_SETTING,
            help="engine buffer",
        ),
        value(
            "--inference-dynamic-batching-buffer-guaranteed-fraction",
            type=float,
            default=0.2,
            status=INFERENCE_SETTING,
            help="engine buffer",
        ),
        value(
            "--inference-dynamic-batching-buffer-overflow-factor",
            type=float,
            status=INFERENCE_SETTING,
            help="engine buffer",
        ),
        value(
            "--inference-dynamic-batching-max-requests-override",
            type=int,
            status=INFERENCE_SETTING,
            help="engine limit",
        ),
        value(
            "--inference-dynamic-batching-max-tokens-override",
            type=int,
            status=INFERENCE_SETTING,
            help="engine limit",
        ),
        switch(
            "--inference-rng-tracker", status=INFERENCE_SETTING, help="no-op random tracker for inference"
        ),
        switch(
            "--output-bert-embeddings",
            status=INFERENCE_SETTING,
            help="embedding extraction mode of legacy BERT",
        ),
        value(
            "--bert-embedder-type",
            default="megatron",
            choices=("megatron", "huggingface"),
            status=INFERENCE_SETTING,
            help="retro embedding source",
        ),
    ),
)

RETRIEVAL = Group(
    "retrieval models",
    (
        value(
            "--retriever-seq-length",
            type=int,
            default=256,
            status=NO_RETRIEVAL,
            help="retriever sequence length",
        ),
        value("--ict-head-size", type=int, status=NO_RETRIEVAL, help="ICT block embedding width"),
        value(
            "--biencoder-projection-dim",
            type=int,
            default=0,
            status=NO_RETRIEVAL,
            help="biencoder projection width",
        ),
        switch("--biencoder-shared-query-context-model", status=NO_RETRIEVAL, help="share the two towers"),
        value("--ict-load", status=NO_RETRIEVAL, help="ICT checkpoint"),
        value("--bert-load", status=NO_RETRIEVAL, help="BERT checkpoint for ICT/REALM"),
        value("--titles-data-path", status=NO_RETRIEVAL, help="ICT titles data"),
        value(
            "--query-in-block-prob",
            type=float,
            default=0.1,
            status=NO_RETRIEVAL,
            help="ICT query keep probability",
        ),
        switch("--use-one-sent-docs", status=NO_RETRIEVAL, help="ICT single-sentence documents"),
        value("--evidence-data-path", status=NO_RETRIEVAL, help="DPR evidence file"),
        value(
            "--retriever-report-topk-accuracies",
            type=int,
            default=[],
            nargs="+",
            status=NO_RETRIEVAL,
            help="retriever top-k report",
        ),
        switch("--retriever-score-scaling", status=NO_RETRIEVAL, help="retriever score scaling"),
        value("--block-data-path", status=NO_RETRIEVAL, help="REALM block data"),
        value("--embedding-path", status=NO_RETRIEVAL, help="retrieval embeddings"),
        value("--indexer-batch-size", type=int, default=128, status=NO_RETRIEVAL, help="indexer batch"),
        value(
            "--indexer-log-interval", type=int, default=1000, status=NO_RETRIEVAL, help="indexer log period"
        ),
        value("--retro-project-dir", status=NO_RETRO, help="Retro project"),
        switch("--retro-add-retriever", status=NO_RETRO, help="Retro model"),
        value("--retro-cyclic-train-iters", type=int, status=NO_RETRO, help="Retro cyclic iterations"),
        value("--retro-encoder-layers", type=int, default=2, status=NO_RETRO, help="Retro encoder depth"),
        value(
            "--retro-encoder-hidden-dropout", type=float, default=0.1, status=NO_RETRO, help="Retro dropout"
        ),
        value(
            "--retro-encoder-attention-dropout",
            type=float,
            default=0.1,
            status=NO_RETRO,
            help="Retro dropout",
        ),
        value("--retro-num-neighbors", type=int, default=2, status=NO_RETRO, help="Retro neighbours"),
        value("--retro-num-retrieved-chunks", type=int, default=2, status=NO_RETRO, help="Retro chunks"),
        value("--retro-attention-gate", type=float, default=1.0, status=NO_RETRO, help="Retro gate"),
        off_switch(
            "--retro-no-verify-neighbor-count",
            "retro_verify_neighbor_count",
            status=NO_RETRO,
            help="Retro check",
        ),
    ),
)

VISION = Group(
    "vision models",
    (
        value("--num-classes", type=int, default=1000, status=NO_VISION, help="vision classes"),
        value("--img-h", type=int, default=224, status=NO_VISION, help="image height"),
        value("--img-w", type=int, default=224, status=NO_VISION, help="image width"),
        value("--num-channels", type=int, default=3, status=NO_VISION, help="image channels"),
        value("--patch-dim", type=int, default=16, status=NO_VISION, help="ViT patch size"),
        value("--classes-fraction", type=float, default=1.0, status=NO_VISION, help="vision class subset"),
        value(
            "--data-per-class-fraction", type=float, default=1.0, status=NO_VISION, help="vision data subset"
        ),
        value(
            "--head-lr-mult",
            type=float,
            default=1.0,
            status=NO_VISION,
            help="vision head learning-rate factor",
        ),
        switch("--vision-pretraining", status=NO_VISION, help="vision pretraining switch"),
        value(
            "--vision-pretraining-type",
            default="classify",
            choices=("classify", "inpaint", "dino"),
            status=NO_VISION,
            help="vision objective",
        ),
        value(
            "--vision-backbone-type",
            default="vit",
            choices=("vit", "mit", "swin"),
            status=NO_VISION,
            help="vision backbone",
        ),
        value(
            "--swin-backbone-type",
            default="tiny",
            choices=("tiny", "base", "h3"),
            status=NO_VISION,
            help="Swin size",
        ),
        value(
            "--mask-type",
            default="random",
            choices=("random", "row"),
            status=NO_VISION,
            help="inpainting mask kind",
        ),
        value("--mask-factor", type=float, default=1.0, status=NO_VISION, help="inpainting mask scale"),
        value("--iter-per-epoch", type=int, default=1250, status=NO_VISION, help="DINO epoch length"),
        value("--dino-local-img-size", type=int, default=96, status=NO_VISION, help="DINO local crop size"),
        value("--dino-local-crops-number", type=int, default=10, status=NO_VISION, help="DINO local crops"),
        value("--dino-head-hidden-size", type=int, default=2048, status=NO_VISION, help="DINO head width"),
        value("--dino-bottleneck-size", type=int, default=256, status=NO_VISION, help="DINO bottleneck"),
        value(
            "--dino-freeze-last-layer", type=float, default=1.0, status=NO_VISION, help="DINO freeze epochs"
        ),
        switch("--dino-norm-last-layer", status=NO_VISION, help="DINO last-layer norm"),
        value(
            "--dino-warmup-teacher-temp",
            type=float,
            default=0.04,
            status=NO_VISION,
            help="DINO teacher temperature",
        ),
        value(
            "--dino-teacher-temp", type=float, default=0.07, status=NO_VISION, help="DINO teacher temperature"
        ),
        value(
            "--dino-warmup-teacher-temp-epochs",
            type=int,
            default=30,
            status=NO_VISION,
            help="DINO teacher warmup",
        ),
    ),
)

HYBRID = Group(
    "state-space and hybrid models",
    (
        value(
            "--hybrid-attention-ratio", type=float, default=0.0, status=NO_STATE_SPACE, help="Mamba hybrid"
        ),
        value("--hybrid-mlp-ratio", type=float, default=0.0, status=NO_STATE_SPACE, help="Mamba hybrid"),
        value("--hybrid-override-pattern", status=NO_STATE_SPACE, help="Mamba hybrid"),
        value("--mamba-state-dim", type=int, default=128, status=NO_STATE_SPACE, help="Mamba"),
        value("--mamba-head-dim", type=int, default=64, status=NO_STATE_SPACE, help="Mamba"),
        value("--mamba-num-groups", type=int, default=8, status=NO_STATE_SPACE, help="Mamba"),
        switch("--is-hybrid-model", status=NO_STATE_SPACE, help="Mamba hybrid"),
    ),
)
