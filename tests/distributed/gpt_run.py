"""Command lines of small runs, and what all their ranks saw together."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.distributed.full_tensors import assemble
from tests.distributed.layouts import GLOBAL_BATCH, MODELS, SEQUENCE, STEPS, Layout
from tests.distributed.pool import run_ranks
from tests.distributed.real_loop import Record, train

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
# Adam divides by the size of a gradient: its epsilon is large here, or rounding in gradients that are
# almost zero would turn into whole steps. Large initial weights make attention prefer some tokens to others.
_COMMON = f"""
    --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE}
    --global-batch-size {GLOBAL_BATCH} --train-iters {STEPS} --lr 5e-3 --adam-eps 1e-3
    --lr-decay-style constant --init-method-std 0.15
    --tokenizer-type NullTokenizer --vocab-size 500 --split 90,8,2 --log-interval 1 --eval-iters 0
    --eval-interval 1000 --num-workers 0 --transformer-impl local --ckpt-format torch
"""
NO_DROPOUT = "--attention-dropout 0 --hidden-dropout 0"


@dataclass(frozen=True)
class Result:
    """What the ranks of a run saw.

    Attributes:
        records: by rank.
        losses: by step; the lists of all ranks that know the loss.
        gradients: by step, name -> the gradient of the whole parameter, once per set of replicas.
    """

    records: list[Record]
    losses: list[list[float]]
    gradients: list[dict[str, list[Tensor]]]


def command_line(layout: Layout, cache: Path, extra: str = NO_DROPOUT) -> list[str]:
    """Words for ``pretrain_gpt.py``."""
    data = ["--data-path", str(GOLDEN / "data" / "u16_text_document"), "--data-cache-path", str(cache)]
    return [*_COMMON.split(), *MODELS[layout.model].split(), *layout.words(), *extra.split(), *data]


def run(
    layout: Layout,
    cache: Path,
    extra: str = NO_DROPOUT,
    timeout: float = 300,
    job: Callable[[list[str]], Record] = train,
) -> Result:
    """Train on ``layout.world_size`` ranks of the pool and put the ranks' gradients together.

    ``job`` is what every rank runs, with the words of the command line.
    """
    argv = command_line(layout, cache, extra)
    records = run_ranks(layout.world_size, job, argv, timeout=timeout)
    for rank, record in enumerate(records):
        assert record.sizes == layout.sizes, (rank, record.sizes)
    losses = [record.losses for record in records if None not in record.losses]
    steps = zip(*(record.gradients for record in records), strict=True)
    return Result(records, losses, [assemble(step) for step in steps])


def worst_difference(result: Result, reference: Result) -> dict[str, float]:
    """Largest relative difference from ``reference`` over all steps and replicas.

    Of the loss, under "loss", and of each gradient: norm of the difference over norm of the reference.
    Names that one of the runs lacks are an error.
    """
    worst: dict[str, float] = {}

    def note(name: str, difference: float) -> None:
        assert difference == difference, f"{name} is not a number"
        worst[name] = max(worst.get(name, 0.0), difference)

    (expected_losses,) = reference.losses
    assert result.losses, "no rank knows the loss"
    for losses in result.losses:
        for loss, expected in zip(losses, expected_losses, strict=True):
            note("loss", abs(loss - expected) / abs(expected))
    for found, expected in zip(result.gradients, reference.gradients, strict=True):
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, replicas in found.items():
            (whole,) = expected[name]
            for replica in replicas:
                difference = torch.linalg.vector_norm(replica - whole) / torch.linalg.vector_norm(whole)
                note(name, float(difference))
    return worst
