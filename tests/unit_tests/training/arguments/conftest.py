"""A command line as a string, parsed and validated in this process."""

import sys
from argparse import Namespace
from collections.abc import Callable

import pytest

from megatron.training.arguments import parse_args, validate_args

MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2"
)
TRAINING = f"{MODEL} --train-iters 20 --lr 1e-3"

Run = Callable[..., Namespace]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Run:
    """``parse("--flag value", base=TRAINING)``: only parsed; a list of words may be given as well."""

    def run(words: str | list[str] = "", base: str = TRAINING, **options) -> Namespace:
        more = words.split() if isinstance(words, str) else words
        monkeypatch.setattr(sys, "argv", ["pretrain", *base.split(), *more])
        return parse_args(**options)

    return run


@pytest.fixture
def check(parse: Run) -> Run:
    """As ``parse``, then validated."""

    def run(words: str | list[str] = "", base: str = TRAINING, defaults: dict | None = None) -> Namespace:
        return validate_args(parse(words, base), defaults or {})

    return run
