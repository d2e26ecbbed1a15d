"""Which global ranks belong together: pure arithmetic on the grid of parallel axes.

A world is a hyper-rectangle with one axis per kind of parallelism. The order string names the axes
from the fastest-moving to the slowest: with ``tp-cp-ep-dp-pp`` neighbouring ranks differ in their
tensor-parallel coordinate first.
"""

from itertools import accumulate
from math import prod
from operator import mul

from megatron.core.errors import UsageError

AXES = ("tp", "cp", "ep", "dp", "pp")


def generate_masked_orthogonal_rank_groups(
    world_size: int, parallel_size: list[int], mask: list[bool]
) -> list[list[int]]:
    """Every group of ranks that share their coordinates on the unmasked axes.

    Args:
        world_size: number of ranks, a multiple of the product of ``parallel_size``.
        parallel_size: size of each axis, the fastest first.
        mask: True for the axes that vary inside a group.

    Returns:
        Groups in the order of their fixed coordinates, first axis fastest; ranks ascending.
    """
    strides = [1]
    for size in parallel_size:
        strides.append(strides[-1] * size)
    block = strides.pop()
    members = _offsets([(n, s) for n, s, m in zip(parallel_size, strides, mask, strict=True) if m])
    anchors = _offsets([(n, s) for n, s, m in zip(parallel_size, strides, mask, strict=True) if not m])
    return [
        [start + anchor + member for member in members]
        for start in range(0, world_size, block)
        for anchor in anchors
    ]


def _offsets(axes: list[tuple[int, int]]) -> list[int]:
    """All sums of coordinate * stride over (size, stride) axes, first axis fastest."""
    offsets = [0]
    for size, stride in axes:
        offsets = [offset + i * stride for i in range(size) for offset in offsets]
    return offsets


class RankGenerator:
    """Rank lists of one (tp, ep, dp, pp, cp) layout for any set of its axes.

    Args:
        tp: tensor-parallel size.
        ep: expert-parallel size; excludes cp > 1, because experts have a grid of their own.
        dp: data-parallel size.
        pp: pipeline-parallel size.
        cp: context-parallel size.
        order: axes joined by ``-``, the fastest first; axes left out must have size 1.
        rank_offset: first global rank of the layout.
    """

    def __init__(self, tp: int, ep: int, dp: int, pp: int, cp: int, order: str, rank_offset: int = 0):
        if ep > 1 and cp > 1:
            raise UsageError(
                f"one rank grid cannot have both expert ({ep}) and context ({cp}) parallel axes: "
                "experts use a grid of their own with cp = 1"
            )
        self.tp, self.ep, self.dp, self.pp, self.cp = tp, ep, dp, pp, cp
        self.rank_offset = rank_offset
        self.world_size = tp * ep * dp * pp * cp
        self.name_to_size = {"tp": tp, "ep": ep, "dp": dp, "pp": pp, "cp": cp}
        axes = order.lower().split("-")
        unknown = sorted(set(axes) - set(AXES))
        if unknown or len(set(axes)) != len(axes):
            raise UsageError(f"rank order {order!r}: name each of {', '.join(AXES)} at most once")
        for axis, size in self.name_to_size.items():
            if axis not in axes:
                if size != 1:
                    raise UsageError(
                        f"rank order {order!r} leaves out {axis}, whose size is {size}: add it, "
                        f"for example {order}-{axis}"
                    )
                axes.append(axis)
        self.order = "-".join(axes)
        self.ordered_size = [self.name_to_size[axis] for axis in axes]

    def get_mask(self, order: str, token: str) -> list[bool]:
        """For each axis of ``order``, whether ``token`` (axes joined by ``-``) names it."""
        named = token.split("-")
        return [axis in named for axis in order.split("-")]

    def get_ranks(self, token: str) -> list[list[int]]:
        """Groups of global ranks that vary along the axes of ``token``, such as ``tp`` or ``dp-cp``."""
        groups = generate_masked_orthogonal_rank_groups(
            self.world_size, self.ordered_size, self.get_mask(self.order, token)
        )
        return [[rank + self.rank_offset for rank in group] for group in groups]

    def get_group(self, token: str, rank: int) -> list[int]:
        """The one group of ``get_ranks(token)`` that holds ``rank``, without listing the others."""
        place = rank - self.rank_offset
        axes = [
            (size, stride)
            for size, stride, named in zip(
                self.ordered_size, self._strides(), self.get_mask(self.order, token), strict=True
            )
            if named
        ]
        first = place - sum(place // stride % size * stride for size, stride in axes)
        return [self.rank_offset + first + offset for offset in _offsets(axes)]

    def stride(self, axis: str) -> int:
        """Distance between neighbouring ranks along ``axis``."""
        return self._strides()[self.order.split("-").index(axis)]

    def _strides(self) -> list[int]:
        return list(accumulate(self.ordered_size[:-1], mul, initial=1))


def levels_of(ranks: list[int], sizes: list[int], rank: int) -> list[list[int]]:
    """The groups of ``rank`` when ``ranks`` is divided into levels, the first of them between neighbours.

    With sizes (2, 3), ranks 0..5 divide into pairs [0 1] [2 3] [4 5] and triples [0 2 4] [1 3 5].

    Raises:
        UsageError: the sizes do not multiply to the number of ranks.
    """
    if prod(sizes) != len(ranks) or min(sizes) < 1:
        raise UsageError(
            f"hierarchical context parallel sizes {' '.join(map(str, sizes))} multiply to {prod(sizes)}, not "
            f"to the context parallel size {len(ranks)}"
        )
    place = ranks.index(rank)
    strides = accumulate(sizes[:-1], mul, initial=1)
    return [
        [ranks[place + (other - place // stride % size) * stride] for other in range(size)]
        for size, stride in zip(sizes, strides, strict=True)
    ]


def make_grids(
    world_size: int, tp: int, pp: int, cp: int, ep: int, expert_tp: int, order: str
) -> dict[str, RankGenerator]:
    """The dense and the expert grid of a world.

    Raises:
        UsageError: a grid does not fill the world, or the two disagree on the pipelines.
    """
    sizes = {"tensor": tp, "pipeline": pp, "context": cp, "expert": ep, "expert tensor": expert_tp}
    for name, size in sizes.items():
        if size < 1:
            raise UsageError(f"{name} parallel size {size}: it must be at least 1")
    for label, model_size in (
        (f"tensor {tp} x pipeline {pp} x context {cp}", tp * pp * cp),
        (f"expert tensor {expert_tp} x expert {ep} x pipeline {pp}", expert_tp * ep * pp),
    ):
        if world_size % model_size:
            below = world_size // model_size * model_size
            fitting = [world for world in (below, below + model_size) if world]
            raise UsageError(
                f"a world of {world_size} ranks does not divide into {label} = {model_size} ranks: "
                f"start {' or '.join(map(str, fitting))} ranks, or choose smaller sizes"
            )
    dense = RankGenerator(tp=tp, ep=1, dp=world_size // (tp * pp * cp), pp=pp, cp=cp, order=order)
    expert_dp = world_size // (expert_tp * ep * pp)
    expert = RankGenerator(tp=expert_tp, ep=ep, dp=expert_dp, pp=pp, cp=1, order=order)
    if pp > 1 and dense.stride("pp") != expert.stride("pp"):
        raise UsageError(
            f"rank order {order!r} gives dense and expert layers different pipelines: end it with pp, "
            "or choose sizes with equal data-parallel sizes"
        )
    return {"dense": dense, "expert": expert}
