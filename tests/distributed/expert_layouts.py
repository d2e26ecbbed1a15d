"""Layouts of a model with experts: where they are, how tokens reach them, and what trains with them."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from tests.distributed.layouts import REDUCTIONS, Layout

DISPATCHERS = ("allgather", "alltoall", "alltoall_seq", "flex")
# Layouts of the experts' weights: words, and those of them that change the names of other parameters.
_GROUPED = "--moe-grouped-gemm"
_FUSED_NAMES = "--transformer-impl transformer_engine"
WEIGHTS = {
    "sequential": ("", ""),
    "grouped": (_GROUPED, ""),
    "grouped-one-by-one": (_GROUPED, _FUSED_NAMES),
}
# Losses and biases that spread tokens. Micro-batches hold one sequence everywhere, as these losses are not
# linear in the tokens of a micro-batch. Coefficients are large, so that an error in them shows.
# Half of them are tried on a model whose first and third of four layers are dense; the other has one such.
_EVERY_SECOND = "--first-k-dense-replace 0 --moe-layer-freq ([0,1]*2)"
BALANCE = {
    "batch-loss": "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.1 "
    "--moe-z-loss-coeff 0.01",
    "sequence-loss": "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.1 "
    f"--moe-router-pre-softmax --moe-router-topk 1 {_EVERY_SECOND}",
    "bias": "--moe-router-load-balancing-type none --moe-router-score-function sigmoid "
    "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.05 --moe-z-loss-coeff 0.01",
    "group-losses": "--moe-router-load-balancing-type group_limited_greedy --moe-router-num-groups 4 "
    "--moe-router-group-topk 2 --moe-aux-loss-coeff 0.1 --moe-device-level-aux-loss-coeff 0.1 "
    f"--moe-comm-aux-loss-coeff 0.1 --seq-aux {_EVERY_SECOND}",
}
RECOMPUTED = {
    "nothing": "",
    "layers-of-experts": "--moe-layer-recompute",
    "activations": "--recompute-granularity selective --recompute-modules moe_act",
}


@dataclass(frozen=True)
class ExpertFlags:
    """What to ask for besides sizes; the first value of each field is the default."""

    dispatcher: str = DISPATCHERS[0]
    weights: str = "sequential"
    reduction: str = "plain"
    balance: str = "batch-loss"
    shared_overlap: bool = False
    recomputed: str = "nothing"

    def everywhere(self) -> str:
        """Words for the run on one rank as well."""
        _, names = WEIGHTS[self.weights]
        return f"--micro-batch-size 1 {BALANCE[self.balance]} {names}"

    def alone(self) -> str:
        """Words that change no result."""
        words = [f"--moe-token-dispatcher-type {self.dispatcher}", WEIGHTS[self.weights][0]]
        words.append("--moe-shared-expert-overlap" if self.shared_overlap else "")
        return " ".join([*words, RECOMPUTED[self.recomputed]])

    def fit(self, bare: Layout) -> bool:
        """Whether a run over ``bare`` can take them."""
        expert_parts = bare.tp if bare.etp is None else bare.etp
        return all(
            (
                self.reduction == "plain" or bare.dp * bare.cp > 1,
                self.dispatcher != "alltoall_seq" or expert_parts == bare.tp,
                not self.shared_overlap or self.dispatcher == "alltoall",
                self.recomputed != "activations" or self.weights != "sequential",
            )
        )


CHOICES = {
    "dispatcher": DISPATCHERS,
    "weights": tuple(WEIGHTS),
    "reduction": tuple(REDUCTIONS),
    "balance": tuple(BALANCE),
    "shared_overlap": (False, True),
    "recomputed": tuple(RECOMPUTED),
}
ExpertLayout = tuple[Layout, ExpertFlags]


def bare(**fields_: Any) -> Layout:
    """A layout of the model with experts, mostly sizes alone; ranks that split layers split sequences too."""
    return Layout(model="moe", sequence_parallel=fields_.get("tp", 1) > 1, **fields_)


BARES = [
    bare(dp=2, ep=2),
    bare(tp=2, ep=2, etp=1),
    bare(cp=2, ep=2),
    bare(dp=2, etp=2),
    bare(tp=2, etp=1),
    bare(dp=4, ep=4),
    bare(dp=4, ep=2),
    bare(tp=2, dp=2, ep=2),
    bare(tp=2, dp=2, ep=4, etp=1),
    bare(tp=2, dp=2, ep=2, etp=1),
    bare(pp=2, dp=2, ep=2),
    bare(pp=2, vpp=2, dp=2, ep=2),
    bare(cp=2, dp=2, ep=2),
    bare(cp=2, dp=2, ep=4),
    bare(tp=2, pp=2, vpp=2, ep=2, etp=1),
]
LARGE = [
    bare(dp=8, ep=4),
    bare(dp=4, ep=2, etp=2),
    bare(tp=2, dp=4, ep=2),
    bare(tp=2, pp=2, dp=2, ep=2),
    bare(tp=2, pp=2, vpp=2, dp=2, ep=2),
    bare(tp=2, cp=2, dp=2, ep=4),
    bare(pp=4, dp=2, ep=2),
    bare(pp=2, cp=2, dp=2, ep=4),
]


def with_flags(layout: Layout) -> list[ExpertLayout]:
    """``layout`` with every combination of flags that it can take."""
    combinations = (
        ExpertFlags(**dict(zip(CHOICES, values, strict=True)))
        for values in itertools.product(*CHOICES.values())
    )
    return [(layout, flags) for flags in combinations if flags.fit(layout)]


def pairs(expert_layout: ExpertLayout) -> set[tuple]:
    """Pairs of two flags, and of a flag and a size, that occur together."""
    layout, flags = expert_layout
    settings = [(each.name, getattr(flags, each.name)) for each in fields(flags)]
    cut = [name for name, size in layout.sizes.items() if size > 1]
    cut += [f"etp{layout.etp}"] if layout.etp else []
    return set(itertools.combinations(settings, 2)) | set(itertools.product(cut, settings))


def pairs_of_flags(expert_layout: ExpertLayout) -> set[tuple]:
    """Those without sizes."""
    return {pair for pair in pairs(expert_layout) if not isinstance(pair[0], str)}


def spread(
    layouts: list[Layout], wanted: Callable[[ExpertLayout], set[tuple]] = pairs, candidates: int = 60
) -> list[ExpertLayout]:
    """Each of ``layouts`` once, then those with ``wanted`` pairs not seen yet, until none is left.

    Of every layout the best of some combinations is taken, drawn anew from a fixed seed each time.
    """
    draw = random.Random(0)
    everything = {layout: with_flags(layout) for layout in layouts}
    missing = set().union(*(wanted(each) for choices in everything.values() for each in choices))
    chosen: list[ExpertLayout] = []

    def take(among: list[Layout]) -> None:
        drawn = (each for layout in among for each in draw.sample(everything[layout], candidates))
        best = max(drawn, key=lambda each: (len(wanted(each) & missing), -each[0].world_size))
        missing.difference_update(wanted(best))
        chosen.append(best)

    for layout in layouts:
        take([layout])
    while missing:
        take(layouts)
    return chosen


def name_of(expert_layout: ExpertLayout) -> str:
    """For test ids: the sizes, and the flags that are not the default."""
    layout, flags = expert_layout
    sizes = {**layout.sizes, "ep": layout.ep, "etp": layout.etp or layout.tp}
    marks = ["-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)]
    for each in fields(flags):
        value = getattr(flags, each.name)
        if value != each.default:
            marks.append("shared-overlap" if value is True else str(value))
    return "-".join(marks)
