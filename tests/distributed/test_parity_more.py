"""Parity of what the table of layouts does not name: other batches, orders, accumulations, and bfloat16."""

import re
from dataclasses import dataclass
from functools import cache

import pytest

from tests.distributed.gpt_run import NO_DROPOUT, Result, run, worst_difference
from tests.distributed.layouts import Layout
from tests.distributed.test_parity import GRADIENT_TOLERANCE, LOSS_TOLERANCE


@dataclass(frozen=True)
class Case:
    """A layout, words for it alone, and words for the run on one rank as well."""

    layout: Layout
    alone: str = ""
    both: str = ""


LATENT = (
    "--multi-latent-attention --kv-lora-rank 12 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 6 "
    "--rotary-scaling-factor 4 --mscale 0.7 --mscale-all-dim 0.3"
)
QUERY_RANK = "--q-lora-rank 16"
TE_NAMES = "--transformer-impl transformer_engine"
FURTHER_TOKENS = "--mtp-num-layers 2 --mtp-loss-scaling-factor 0.3"
TIED_ROTARY = f"{FURTHER_TOKENS} --position-embedding-type rope"

CASES = {
    # Worlds that are no powers of two, for which the batch and the sequence change.
    "three-replicas": Case(
        Layout(dp=3, reduction="sharded"), both="--global-batch-size 6 --micro-batch-size 1"
    ),
    "three-parts-of-a-sequence": Case(
        Layout(cp=3, model="llama"), both="--seq-length 24 --max-position-embeddings 24"
    ),
    "three-stages-of-six": Case(Layout(tp=2, pp=3, stages="account")),
    "six-stages-two-without-layers": Case(Layout(pp=6, stages="account", model="llama")),
    "seven-replicas": Case(
        Layout(dp=7, reduction="sharded-overlap-both"), both="--global-batch-size 7 --micro-batch-size 1"
    ),
    # Microbatches of unequal numbers of tokens.
    "masked-tokens": Case(Layout(cp=2, dp=2), both="--eod-mask-loss --micro-batch-size 1"),
    "per-token-loss": Case(
        Layout(pp=2, cp=2, dp=2, reduction="sharded-overlap-reduce"),
        both="--eod-mask-loss --calculate-per-token-loss",
    ),
    "per-token-loss-tensor-parallel": Case(
        Layout(tp=2, dp=2, sequence_parallel=True, model="llama"),
        both="--eod-mask-loss --calculate-per-token-loss",
    ),
    "smaller-microbatches": Case(
        Layout(tp=2, pp=2, vpp=2, sequence_parallel=True), alone="--micro-batch-size 1"
    ),
    # Other ways to the same sums.
    "average-in-collective": Case(Layout(dp=4, reduction="sharded"), alone="--ddp-average-in-collective"),
    "stages-before-replicas": Case(Layout(tp=2, pp=2, dp=2), alone="--use-tp-pp-dp-mapping"),
    "groups-of-microbatches": Case(
        Layout(pp=2, vpp=2, model="llama"), alone="--microbatch-group-size-per-virtual-pipeline-stage 4"
    ),
    "recomputed": Case(
        Layout(tp=2, pp=2, sequence_parallel=True),
        alone="--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
    "recomputed-over-a-split-sequence": Case(Layout(cp=2, dp=2), alone="--recompute-activations"),
    "no-fusion-of-gradient-accumulation": Case(
        Layout(tp=2, pp=2, model="llama"), alone="--no-gradient-accumulation-fusion"
    ),
    # Matmuls cut into chunks whose traffic overlaps; 16 and 8 rows of a rank make 2 and 8 chunks.
    "chunked-matmuls": Case(
        Layout(tp=2, sequence_parallel=True), alone="--use-ascend-coc --coc-parallel-num 2"
    ),
    "chunked-matmuls-summed-everywhere": Case(
        Layout(tp=4, dp=2, model="llama"), alone="--use-ascend-coc --coc-parallel-num 8"
    ),
    **{
        f"latent-attention-{name}": Case(
            layout, both=LATENT if more is None else f"{LATENT} {QUERY_RANK} {more}"
        )
        for name, layout, more in (
            ("tensor-parallel", Layout(tp=2, model="llama"), ""),
            ("tensor-parallel-whole-latents", Layout(tp=2, model="llama"), TE_NAMES),
            ("sequence-parallel", Layout(tp=2, sequence_parallel=True, model="llama"), "--qk-layernorm"),
            (
                "sequence-parallel-whole-latents",
                Layout(tp=2, pp=2, sequence_parallel=True, model="llama"),
                f"{TE_NAMES} --qk-layernorm",
            ),
            ("ring", Layout(cp=2, dp=2, model="llama", reduction="sharded"), "--qk-layernorm"),
            ("heads-exchanged", Layout(cp=2, tp=2, context="a2a", model="llama"), ""),
            ("keys-gathered", Layout(cp=4, context="all_gather", model="llama"), ""),
            ("whole-queries", Layout(tp=2, pp=2, vpp=2, model="llama"), None),
        )
    },
    **{
        f"further-tokens-{name}": Case(layout, alone, TIED_ROTARY if layout.model == "gpt" else both)
        for name, layout, alone, both in (
            ("tensor-parallel", Layout(tp=2, model="llama"), "", FURTHER_TOKENS),
            (
                "sequence-parallel",
                Layout(tp=2, sequence_parallel=True, model="llama"),
                "",
                f"{FURTHER_TOKENS} {TE_NAMES}",
            ),
            ("stages", Layout(pp=2, model="llama"), "", f"{FURTHER_TOKENS} --mtp-before-norm"),
            ("stages-tied", Layout(tp=2, pp=2, sequence_parallel=True), "", ""),
            ("virtual-stages", Layout(pp=2, vpp=2, tp=2, model="llama"), "", FURTHER_TOKENS),
            ("virtual-stages-tied", Layout(pp=2, vpp=2, dp=2, reduction="sharded-overlap-both"), "", ""),
            ("late-weight-gradients", Layout(pp=2, pipeline="zb-h1", model="llama"), "", FURTHER_TOKENS),
            ("replicas", Layout(dp=2, reduction="sharded-overlap-both", model="llama"), "", FURTHER_TOKENS),
            ("ring", Layout(cp=2, dp=2, model="llama", reduction="sharded"), "", FURTHER_TOKENS),
            ("heads-exchanged", Layout(cp=2, pp=2, context="a2a"), "", ""),
            (
                "masked-tokens",
                Layout(cp=2, dp=2, pp=2, model="llama"),
                "",
                f"{FURTHER_TOKENS} --eod-mask-loss --micro-batch-size 1",
            ),
            (
                "per-token-loss",
                Layout(pp=2, cp=2, dp=2, reduction="overlap-reduce", model="llama"),
                "",
                f"{FURTHER_TOKENS} --eod-mask-loss --calculate-per-token-loss",
            ),
            (
                "recomputed",
                Layout(tp=2, pp=2, sequence_parallel=True, model="llama"),
                "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
                FURTHER_TOKENS,
            ),
        )
    },
    "q-and-k-norms": Case(Layout(tp=2, cp=2, model="llama"), both="--qk-layernorm"),
}


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@cache
def reference(model: str, both: str, data_cache) -> Result:
    return run(Layout(model=model), data_cache, f"{NO_DROPOUT} {both}")


# Chunks beside what else moves or defers matmuls and their gradients.
CHUNKED = {
    f"{layout}-{chunks}-chunks": Case(layout, alone=f"--use-ascend-coc --coc-parallel-num {chunks}")
    for layout, chunks in (
        (Layout(tp=2, pp=2, pipeline="zb-h1", sequence_parallel=True), 2),
        (Layout(tp=2, pp=2, pipeline="zb-h1", model="llama"), 4),
        (Layout(tp=2, dp=2, reduction="sharded-overlap-both", sequence_parallel=True, model="llama"), 4),
        (Layout(tp=2, pp=2, vpp=2, dp=2, reduction="sharded", sequence_parallel=True), 2),
        (Layout(tp=4, cp=2, sequence_parallel=True), 8),
    )
}


@pytest.mark.parametrize("name", CASES)
def test_layout_gives_the_losses_and_gradients_of_one_rank(name, data_cache):
    check(CASES[name], name, data_cache)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_matmuls_give_the_losses_and_gradients_of_one_rank(name, data_cache):
    check(CHUNKED[name], name, data_cache)


def check(case, name, data_cache):
    result = run(case.layout, data_cache, f"{NO_DROPOUT} {case.both} {case.alone}")
    worst = worst_difference(result, reference(case.layout.model, case.both, data_cache))
    print(name, {key: f"{worst[key]:.1e}" for key in sorted(worst, key=worst.get)[-2:]})
    assert worst.pop("loss") < LOSS_TOLERANCE
    assert max(worst.values()) < GRADIENT_TOLERANCE
    expected = further_losses(reference(case.layout.model, case.both, data_cache))
    assert bool(expected) == ("--mtp-num-layers" in case.both)
    # The log averages means of micro-batches, whose numbers of tokens may differ between layouts.
    tolerance = 1e-3 if "--calculate-per-token-loss" in case.both else LOSS_TOLERANCE
    assert further_losses(result) == pytest.approx(expected, rel=tolerance)


def further_losses(result: Result) -> list[float]:
    """What the log lines say of the losses of further tokens."""
    lines = "".join(record.output for record in result.records)
    return [float(loss) for loss in re.findall(r"mtp_\d loss: (\S+)", lines)]


# bfloat16 keeps 8 bits (2^-8 = 4e-3), and gradients pass through four layers twice: the order of sums shows.
# Seen: losses within 4e-4 and gradients within 7e-2 of one rank's; a missing or doubled term is far outside.
BF16_LOSS_TOLERANCE = 1e-3
BF16_GRADIENT_TOLERANCE = 1.2e-1
# A sum of rounded parts may be as far from the truth as a rounded sum, not much farther.
BF16_FARTHER_FROM_FLOAT32 = 1.5
BF16_LAYOUTS = [
    Layout(dp=2, reduction="sharded-overlap-both"),
    Layout(tp=2, sequence_parallel=True, model="llama"),
    Layout(tp=2, pp=2, vpp=2, model="llama"),
    Layout(cp=2, dp=2, reduction="overlap-reduce"),
    Layout(tp=2, pp=2, cp=2, sequence_parallel=True, reduction="sharded", model="llama"),
]


@pytest.mark.parametrize("layout", BF16_LAYOUTS, ids=str)
def test_bfloat16_stays_within_its_rounding(layout, data_cache):
    result = run(layout, data_cache, f"{NO_DROPOUT} --bf16")
    one_rank, exact = (reference(layout.model, words, data_cache) for words in ("--bf16", ""))
    worst = worst_difference(result, one_rank)
    error, one_rank_error = worst_difference(result, exact), worst_difference(one_rank, exact)
    farther = {name: error[name] / one_rank_error[name] for name in worst if name != "loss"}
    print(f"{layout}: loss {worst['loss']:.1e}", f"farther {max(farther.values()):.2f}")
    assert worst.pop("loss") < BF16_LOSS_TOLERANCE
    print(f"gradients {max(worst.values()):.1e}")
    assert max(worst.values()) < BF16_GRADIENT_TOLERANCE
    assert max(farther.values()) < BF16_FARTHER_FROM_FLOAT32
