"""Flags and values that parse but always stop the run, with the reason and the way out."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatron.training.arguments.flag import Flag, Group, off_switch, switch, value
from megatron.training.arguments.problem import Problem


@dataclass(frozen=True)
class Rejected:
    """Flags refused for one reason."""

    rule: str
    remedy: str
    flags: tuple[Flag, ...]


@dataclass(frozen=True)
class RejectedValue:
    """Values of an otherwise working flag that are refused."""

    flag: str
    dest: str
    values: tuple[Any, ...]
    rule: str
    remedy: str


REJECTED = (
    Rejected(
        "multimodal models are not part of this project",
        "leave it out",
        (value("--mrope-section", type=int, nargs="+", help="channel split for multimodal RoPE"),),
    ),
    Rejected(
        "retrieval models (ICT, REALM, biencoders) are not part of this project",
        "leave it out",
        (
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
    ),
    Rejected(
        "vision models are not part of this project",
        "leave it out",
        (
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
                "--vision-backbone-type",
                default="vit",
                choices=("vit", "mit", "swin"),
                help="vision backbone",
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
    ),
    Rejected(
        "per-layer architectures from a file are not part of this project",
        "give the sizes as flags",
        (
            value("--heterogeneous-layers-config-path", help="per-layer Nemotron-NAS config file"),
            value("--heterogeneous-layers-config-encoded-json", help="same config as a JSON string"),
        ),
    ),
    Rejected(
        "retrieval-enhanced (Retro) models are not part of this project",
        "leave it out",
        (
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
    Rejected(
        "state-space (Mamba) and hybrid models are not part of this project",
        "leave it out",
        (
            value("--hybrid-attention-ratio", type=float, default=0.0, help="Mamba hybrid"),
            value("--hybrid-mlp-ratio", type=float, default=0.0, help="Mamba hybrid"),
            value("--hybrid-override-pattern", help="Mamba hybrid"),
            value("--mamba-state-dim", type=int, default=128, help="Mamba"),
            value("--mamba-head-dim", type=int, default=64, help="Mamba"),
            value("--mamba-num-groups", type=int, default=8, help="Mamba"),
            switch("--is-hybrid-model", help="Mamba hybrid"),
        ),
    ),
    Rejected(
        "withdrawn",
        "use --micro-batch-size",
        (value("--batch-size", type=int, help="withdrawn spelling of the micro batch size"),),
    ),
    Rejected(
        "withdrawn",
        "use --lr-warmup-fraction",
        (value("--warmup", type=int, help="withdrawn warmup argument"),),
    ),
    Rejected(
        "withdrawn",
        "use --tensor-model-parallel-size",
        (value("--model-parallel-size", type=int, help="withdrawn tensor-parallel argument"),),
    ),
    Rejected(
        "withdrawn",
        "use --recompute-activations, or --recompute-granularity full --recompute-method uniform",
        (switch("--checkpoint-activations", help="withdrawn recompute switch"),),
    ),
    Rejected(
        "only the models of megatron.core exist here",
        "leave it out",
        (switch("--use-legacy-models", help="pre-core model classes"),),
    ),
)

REJECTED_VALUES = (
    RejectedValue(
        "--position-embedding-type",
        "position_embedding_type",
        ("mrope",),
        "multimodal models are not part of this project",
        "use --position-embedding-type rope",
    ),
    RejectedValue(
        "--tokenizer-type",
        "tokenizer_type",
        ("MultimodalTokenizer", "NullMultimodalTokenizer"),
        "multimodal models are not part of this project",
        "use a text tokenizer such as HuggingFaceTokenizer",
    ),
    RejectedValue(
        "--non-persistent-ckpt-type",
        "non_persistent_ckpt_type",
        ("local", "in_memory"),
        "needs a package for node-local checkpoints that is not part of this project",
        "leave it out and use --save with --save-interval",
    ),
    RejectedValue(
        "--context-parallel-algo",
        "context_parallel_algo",
        ("adaptive_cp_algo", "hybrid_adaptive_cp_algo", "mamba_cp_algo"),
        "this context-parallel scheme is not part of this project",
        "use ulysses_cp_algo, megatron_cp_algo or hybrid_cp_algo",
    ),
)

GROUP = Group("refused", tuple(flag for row in REJECTED for flag in row.flags))

# Attributes that only exist to explain a withdrawn flag; they leave the namespace once it is checked.
WITHDRAWN_DESTS = ("batch_size", "warmup", "model_parallel_size", "checkpoint_activations")


def rejected_problems(args: Namespace, given: Iterable[str]) -> list[Problem]:
    """A problem for every refused flag in ``given`` and every refused value in ``args``."""
    given = set(given)
    problems = [
        Problem(name, getattr(args, flag.dest, None), row.rule, row.remedy)
        for row in REJECTED
        for flag in row.flags
        for name in flag.names
        if name in given
    ]
    for row in REJECTED_VALUES:
        asked = getattr(args, row.dest, None)
        if asked in row.values:
            problems.append(Problem(row.flag, asked, row.rule, row.remedy))
    return problems
