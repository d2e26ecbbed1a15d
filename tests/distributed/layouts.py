"""Layouts of a run over ranks, the flags that ask for them, and which combinations make sense."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields, replace

LAYERS = 4
SEQUENCE = 32
GLOBAL_BATCH = 8
STEPS = 4

# How gradients are reduced: the words that ask for it.
REDUCTIONS = {
    "plain": "",
    "overlap-reduce": "--overlap-grad-reduce --ddp-bucket-size 3000",
    "sharded": "--use-distributed-optimizer",
    "sharded-overlap-reduce": "--use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 3000",
    "sharded-overlap-both": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    " --ddp-bucket-size 3000",
}
CONTEXT = {
    "p2p": "--cp-comm-type p2p",
    "all_gather": "--cp-comm-type all_gather",
    "a2a": "--cp-comm-type a2a",
    "a2a+p2p": "--cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes {inner} {outer}",
}
STAGES = {
    "even": "",
    "first-short": "--decoder-first-pipeline-num-layers 1",
    "last-short": "--decoder-last-pipeline-num-layers 1",
    "account": "--account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split",
}
PIPELINE = {
    "overlap": "",
    "no-overlap": "--no-overlap-p2p-communication",
    "zb-h1": "--pipeline-schedule zb-h1",
}
MODELS = {
    "gpt": "--num-layers 4 --hidden-size 32 --num-attention-heads 8 --normalization LayerNorm"
    " --position-embedding-type learned_absolute",
    "llama": "--num-layers 4 --hidden-size 64 --num-attention-heads 16 --group-query-attention"
    " --num-query-groups 8 --position-embedding-type rope --normalization RMSNorm --swiglu"
    " --ffn-hidden-size 96 --untie-embeddings-and-output-weights --disable-bias-linear"
    " --no-rope-fusion",
}
# Two dense layers' width in experts, so that a pipeline stage has layers of one kind and of both.
MODELS["moe"] = MODELS["llama"] + (
    " --num-experts 4 --moe-ffn-hidden-size 32 --first-k-dense-replace 1 --moe-layer-freq 1"
    " --n-shared-experts 1 --shared-expert-gate"
)
PADDED_VOCAB = 512


@dataclass(frozen=True)
class Layout:
    """One way to run a model over ``tp * pp * cp * dp`` ranks."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1
    model: str = "gpt"
    sequence_parallel: bool = False
    reduction: str = "plain"
    context: str = "p2p"
    stages: str = "even"
    pipeline: str = "overlap"
    ep: int = 1
    etp: int | None = None
    experts: str = ""
    """Words about experts."""

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def microbatches(self) -> int:
        """As few as show accumulation, and in a pipeline all its phases: a test mostly waits for them."""
        return min(GLOBAL_BATCH // self.dp, {1: 2, 2: 4}.get(self.pp, 8))

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in ("tp", "pp", "vpp", "cp", "dp")}

    def __str__(self) -> str:
        axes = "-".join(f"{axis}{size}" for axis, size in self.sizes.items() if size > 1) or "alone"
        marks = [self.model, axes]
        for field_, default in zip(fields(self), astuple(Layout()), strict=True):
            value = getattr(self, field_.name)
            if field_.name not in self.sizes and field_.name != "model" and value != default:
                marks.append("sp" if value is True else str(value))
        return "-".join(marks)

    def words(self) -> list[str]:
        """The flags of this layout; those of the model are not among them."""
        words = [f"--tensor-model-parallel-size {self.tp}", f"--pipeline-model-parallel-size {self.pp}"]
        words.append(f"--context-parallel-size {self.cp}")
        if self.vpp > 1:
            words.append(f"--num-virtual-stages-per-pipeline-rank {self.vpp}")
        if self.sequence_parallel:
            words.append("--sequence-parallel")
        if self.cp > 1:
            words.append(CONTEXT[self.context].format(inner=2, outer=self.cp // 2))
        if self.model == "moe":
            words.append(f"--expert-model-parallel-size {self.ep} {self.experts}")
            if self.etp is not None:
                words.append(f"--expert-tensor-parallel-size {self.etp}")
        words += [REDUCTIONS[self.reduction], STAGES[self.stages], PIPELINE[self.pipeline]]
        words.append(f"--micro-batch-size {GLOBAL_BATCH // self.dp // self.microbatches}")
        words.append(f"--make-vocab-size-divisible-by {PADDED_VOCAB // self.tp}")
        return " ".join(words).split()

    def makes_sense(self) -> bool:
        """Whether such a run exists, and differs from one with a flag less."""
        return all(
            (
                GLOBAL_BATCH % self.dp == 0,
                PADDED_VOCAB % self.tp == 0,
                self._stages_fit(),
                self.vpp == 1 or (self.pp > 1 and self.microbatches % self.pp == 0),
                self.pp > 1 or self.pipeline == "overlap",
                self.vpp > 1 or self.pipeline != "no-overlap",
                self.vpp == 1 or self.pipeline != "zb-h1",
                self.tp > 1 or not self.sequence_parallel,
                self.cp > 1 or self.context == "p2p",
                self.context != "a2a+p2p" or self.cp >= 4,
                self.context not in ("a2a", "a2a+p2p") or 8 % (self.tp * self.cp) == 0,
                self.dp * self.cp > 1 or self.reduction == "plain",
            )
        )

    def _stages_fit(self) -> bool:
        chunks = self.pp * self.vpp
        return {
            "even": LAYERS % chunks == 0,
            "first-short": self.pp > 1 and self.vpp == 1 and (LAYERS - 1) % (self.pp - 1) == 0,
            "last-short": self.pp > 1 and self.vpp == 1 and (LAYERS - 1) % (self.pp - 1) == 0,
            "account": self.pp > 1 and (LAYERS + 2) % chunks == 0,
        }[self.stages] and (self.stages == "even" or chunks != LAYERS)


_CHOICES = {
    "model": ["gpt", "llama"],
    "sequence_parallel": [False, True],
    "reduction": list(REDUCTIONS),
    "context": list(CONTEXT),
    "stages": list(STAGES),
    "pipeline": list(PIPELINE),
}


def bare_layouts(world_sizes: tuple[int, ...] = (1, 2, 4, 8)) -> list[Layout]:
    """Every (tp, pp, vpp, cp, dp) with one of the world sizes that the models and the batch divide into."""
    found = []
    for world in world_sizes:
        divisors = [d for d in range(1, world + 1) if world % d == 0]
        for tp, pp, cp in itertools.product(divisors, repeat=3):
            if world % (tp * pp * cp):
                continue
            for vpp in (1, 2, 3):
                bare = Layout(tp, pp, vpp, cp, world // (tp * pp * cp))
                if any(replace(bare, stages=stages).makes_sense() for stages in STAGES):
                    found.append(bare)
    return found


def with_flags(bare: Layout) -> Iterator[Layout]:
    """``bare`` with every combination of flags that makes sense."""
    for values in itertools.product(*_CHOICES.values()):
        layout = replace(bare, **dict(zip(_CHOICES, values, strict=True)))
        if layout.makes_sense():
            yield layout


def pairs(layout: Layout) -> set[tuple]:
    """Pairs of settings that occur together: flags with flags, and flags with axes that are cut."""
    settings = [(name, getattr(layout, name)) for name in _CHOICES]
    settings += [(axis, size > 1) for axis, size in layout.sizes.items()]
    return set(itertools.combinations(settings, 2))


def spread(bares: list[Layout]) -> list[Layout]:
    """Each of ``bares`` at least once, and every pair of settings that can occur together at least once.

    Flags go to layouts so that the pairs seen least often come first; pairs left over get a small one more.
    """
    seen: Counter[tuple] = Counter()
    chosen = []
    for bare in bares:
        best = max(with_flags(bare), key=lambda layout: sum(_rarity(seen[pair]) for pair in pairs(layout)))
        seen.update(pairs(best))
        chosen.append(best)
    everything = sorted(
        (layout for bare in bares for layout in with_flags(bare)), key=lambda each: each.world_size
    )
    for layout in everything:
        if any(pair not in seen for pair in pairs(layout)):
            seen.update(pairs(layout))
            chosen.append(layout)
    return chosen


def _rarity(times: int) -> int:
    """Weight of a pair seen so often; an integer, so that the choice does not hang on the order of adding."""
    return 10**6 // (1 + times) ** 3
