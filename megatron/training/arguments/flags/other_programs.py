"""Inference settings, which training accepts, and flags of models that are not part of this project."""

from megatron.training.arguments.flag import Accepted, Group, Refused, alike, off_switch, switch, value

INFERENCE_SETTING = Accepted("this setting of the inference engine has no effect on training")
NO_RETRIEVAL = Refused("retrieval models (ICT, REALM, biencoders) are not part of this project")
NO_VISION = Refused("vision models are not part of this project")
NO_RETRO = Refused("retrieval-enhanced (Retro) models are not part of this project")
NO_STATE_SPACE = Refused("state-space (Mamba) and hybrid models are not part of this project")

INFERENCE = Group(
    "inference",
    alike(
        INFERENCE_SETTING,
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
        value("--inference-dynamic-batching-buffer-size-gb", type=float, default=40.0, help="engine buffer"),
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
)

RETRIEVAL = Group(
    "retrieval models",
    (
        *alike(
            NO_RETRIEVAL,
            value("--retriever-seq-length", type=int, default=256, help="retriever sequence length"),
            value("--ict-head-size", type=int, help="ICT block embedding width"),
            value("--biencoder-projection-dim", type=int, default=0, help="biencoder projection width"),
            switch("--biencoder-shared-query-context-model", help="share the two towers"),
            value("--ict-load", help="ICT checkpoint"),
            value("--bert-load", help="BERT checkpoint for ICT/REALM"),
            value("--titles-data-path", help="ICT titles data"),
            value("--query-in-block-prob", type=float, default=0.1, help="ICT query keep probability"),
            switch("--use-one-sent-docs", help="ICT single-sentence documents"),
            value("--evidence-data-path", help="DPR evidence file"),
            value(
                "--retriever-report-topk-accuracies",
                type=int,
                default=[],
                nargs="+",
                help="retriever top-k report",
            ),
            switch("--retriever-score-scaling", help="retriever score scaling"),
            value("--block-data-path", help="REALM block data"),
            value("--embedding-path", help="retrieval embeddings"),
            value("--indexer-batch-size", type=int, default=128, help="indexer batch"),
            value("--indexer-log-interval", type=int, default=1000, help="indexer log period"),
        ),
        *alike(
            NO_RETRO,
            value("--retro-project-dir", help="Retro project"),
            switch("--retro-add-retriever", help="Retro model"),
            value("--retro-cyclic-train-iters", type=int, help="Retro cyclic iterations"),
            value("--retro-encoder-layers", type=int, default=2, help="Retro encoder depth"),
            value("--retro-encoder-hidden-dropout", type=float, default=0.1, help="Retro dropout"),
            value("--retro-encoder-attention-dropout", type=float, default=0.1, help="Retro dropout"),
            value("--retro-num-neighbors", type=int, default=2, help="Retro neighbours"),
            value("--retro-num-retrieved-chunks", type=int, default=2, help="Retro chunks"),
            value("--retro-attention-gate", type=float, default=1.0, help="Retro gate"),
            off_switch("--retro-no-verify-neighbor-count", "retro_verify_neighbor_count", help="Retro check"),
        ),
    ),
)

VISION = Group(
    "vision models",
    alike(
        NO_VISION,
        value("--num-classes", type=int, default=1000, help="vision classes"),
        value("--img-h", type=int, default=224, help="image height"),
        value("--img-w", type=int, default=224, help="image width"),
        value("--num-channels", type=int, default=3, help="image channels"),
        value("--patch-dim", type=int, default=16, help="ViT patch size"),
        value("--classes-fraction", type=float, default=1.0, help="vision class subset"),
        value("--data-per-class-fraction", type=float, default=1.0, help="vision data subset"),
        value("--head-lr-mult", type=float, default=1.0, help="vision head learning-rate factor"),
        switch("--vision-pretraining", help="vision pretraining switch"),
        value(
            "--vision-pretraining-type",
            default="classify",
            choices=("classify", "inpaint", "dino"),
            help="vision objective",
        ),
        value(
            "--vision-backbone-type", default="vit", choices=("vit", "mit", "swin"), help="vision backbone"
        ),
        value("--swin-backbone-type", default="tiny", choices=("tiny", "base", "h3"), help="Swin size"),
        value("--mask-type", default="random", choices=("random", "row"), help="inpainting mask kind"),
        value("--mask-factor", type=float, default=1.0, help="inpainting mask scale"),
        value("--iter-per-epoch", type=int, default=1250, help="DINO epoch length"),
        value("--dino-local-img-size", type=int, default=96, help="DINO local crop size"),
        value("--dino-local-crops-number", type=int, default=10, help="DINO local crops"),
        value("--dino-head-hidden-size", type=int, default=2048, help="DINO head width"),
        value("--dino-bottleneck-size", type=int, default=256, help="DINO bottleneck"),
        value("--dino-freeze-last-layer", type=float, default=1.0, help="DINO freeze epochs"),
        switch("--dino-norm-last-layer", help="DINO last-layer norm"),
        value("--dino-warmup-teacher-temp", type=float, default=0.04, help="DINO teacher temperature"),
        value("--dino-teacher-temp", type=float, default=0.07, help="DINO teacher temperature"),
        value("--dino-warmup-teacher-temp-epochs", type=int, default=30, help="DINO teacher warmup"),
    ),
)

HYBRID = Group(
    "state-space and hybrid models",
    alike(
        NO_STATE_SPACE,
        value("--hybrid-attention-ratio", type=float, default=0.0, help="Mamba hybrid"),
        value("--hybrid-mlp-ratio", type=float, default=0.0, help="Mamba hybrid"),
        value("--hybrid-override-pattern", help="Mamba hybrid"),
        value("--mamba-state-dim", type=int, default=128, help="Mamba"),
        value("--mamba-head-dim", type=int, default=64, help="Mamba"),
        value("--mamba-num-groups", type=int, default=8, help="Mamba"),
        switch("--is-hybrid-model", help="Mamba hybrid"),
    ),
)
