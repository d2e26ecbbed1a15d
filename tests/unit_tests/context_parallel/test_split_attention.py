"""Output and gradients of every exchange equal dense float64 attention on one rank."""

import itertools

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.context_parallel import gather
from megatron.core.context_parallel.partial import SplitAttention
from megatron.core.context_parallel.plan import visible_band
from tests.distributed.pool import run_ranks
from tests.unit_tests.context_parallel.split_world import HEADS, WIDTH, Case, start, worst_errors

# Largest error over largest value. Half precisions round the operands of products and the results: a few of
# their own last places (2^-8 and 2^-11), gradients of keys once per hop.
BOUNDS = {"float64": 1e-13, "float32": 6e-6, "bfloat16": 2.5e-2, "float16": 3e-3}
KINDS = ("p2p", "all_gather", "a2a")
CHUNK = 3
# Smaller than a chunk, none at all, across chunks, to the length of a rank's part and more, to the right.
WINDOWS = ((2, 0), (0, 0), (CHUNK + 1, 0), (2 * CHUNK, 0), (50, 0), (2, 2), (-1, 4), (4, -1), (7, 5))


def hold(world: int, cases: list[Case]) -> None:
    by_rank = run_ranks(world, worst_errors, cases)
    for number, case in enumerate(cases):
        for rank, errors in enumerate(by_rank):
            for name, error in zip(("output", "dq", "dk", "dv"), errors[number], strict=True):
                bound = BOUNDS[case.dtype]
                assert error <= bound, f"{case} rank {rank}: {name} is off by {error:.2e}, bound {bound:.0e}"


def fitting(world: int, cases: list[Case]) -> list[Case]:
    """a2a needs query groups that divide, or are divided by, the number of ranks."""
    return [
        c
        for c in cases
        if c.kind != "a2a" or (HEADS % world == 0 and not (c.groups % world and world % c.groups))
    ]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_masks_and_groups(world):
    shapes = [Case(causal=c, window=w) for c in (True, False) for w in (None, *WINDOWS)]
    shapes += [Case(causal=c, groups=g) for c in (True, False) for g in (1, 2)]
    shapes += [Case(window=(4, 0), groups=g) for g in (1, 2)]
    cases = [Case(kind, s.causal, s.window, s.groups) for kind, s in itertools.product(KINDS, shapes)]
    hold(world, fitting(world, cases))


@pytest.mark.parametrize("world", [2, 4])
def test_layouts_backends_and_types(world):
    cases = [
        Case(kind, True, window, 2, layout, backend, dtype)
        for kind in KINDS
        for layout, backend in (("SBH", "fused"), ("BSH", "fused"), ("SBH", "unfused"), ("BSH", "unfused"))
        for window in (None, (4, 0))
        for dtype in ("float64", "float32", "bfloat16", "float16")
    ]
    hold(world, [c for c in cases if c.dtype != "float64" or c.backend == "fused"])


@pytest.mark.parametrize("world", [2, 4])
def test_documents_and_widths(world):
    cases = [
        Case(kind, mask="documents", groups=2, backend=b) for kind in KINDS for b in ("fused", "unfused")
    ]
    cases += [Case(kind, mask="documents", window=(5, 0)) for kind in KINDS]
    cases += [
        Case(kind, value_width=WIDTH + 4, window=w) for kind in ("p2p", "all_gather") for w in (None, (4, 0))
    ]
    scaled = (("apply_query_key_layer_scaling", True), ("softmax_scale", None))
    cases += [Case(kind, layer_number=3, config=scaled) for kind in KINDS]
    hold(world, cases)


@pytest.mark.parametrize("world", [2, 4])
def test_soft_caps(world):
    capped = (("attn_logit_softcapping", 1.5),)
    cases = [
        Case(kind, window=window, groups=2, backend=backend, dtype=dtype, config=capped, hierarchy=hierarchy)
        for kind, hierarchy in (*((kind, None) for kind in KINDS), ("a2a+p2p", (2, world // 2)))
        for backend, window in (("fused", None), ("unfused", None), ("fused", (4, 0)))
        for dtype in ("float64", "bfloat16")
    ]
    cases += [Case(kind, mask="documents", config=capped) for kind in KINDS]
    hold(world, cases)


def test_two_level_split_equals_one_rank():
    shapes = [
        Case("a2a+p2p", causal, window, groups, mask=mask, hierarchy=(2, 2))
        for causal, window, groups, mask in (
            (True, None, 4, None),
            (False, None, 2, None),
            (True, (4, 0), 1, None),
            (True, (9, 0), 4, "documents"),
            (True, None, 1, "documents"),
        )
    ]
    hold(4, [*shapes, Case("a2a+p2p", hierarchy=(4, 1)), Case("a2a+p2p", hierarchy=(1, 4))])


def test_eight_ranks():
    cases = [Case(kind, window=w, groups=2) for kind in ("p2p", "all_gather") for w in (None, (4, 0))]
    cases += [
        Case("a2a+p2p", groups=g, window=w, hierarchy=h)
        for g in (1, 4)
        for w in (None, (8, 0))
        for h in ((2, 4), (4, 2))
    ]
    hold(8, cases)


def test_blocks_longer_than_a_stripe():
    """Chunks of several hundred positions are worked on in stripes."""
    cases = [
        Case("p2p", groups=2, chunk=260, window=(250, 0)),
        Case("all_gather", groups=1, chunk=260, window=(3, 0)),
        Case("p2p", mask="documents", chunk=260),
        Case("p2p", value_width=4, chunk=260, window=(300, 0)),
    ]
    hold(2, cases)


def blocks_of_gathered_attention(size: int) -> list[int]:
    """How many blocks this rank computes of causal attention, without a mask and with one."""
    start(size)
    band = visible_band(causal=True, window=None)
    mask = torch.zeros(1, 1, 2 * CHUNK, 2 * size * CHUNK, dtype=torch.bool)
    group = parallel_state.get_context_parallel_group()
    specs = [SplitAttention(band, given, 1.0, 0.0, 0) for given in (None, mask)]
    return [len(gather._tasks(group, 2 * CHUNK, spec)) for spec in specs]


@pytest.mark.parametrize("size", [2, 4])
def test_gathered_attention_joins_blocks_only_without_a_mask(size):
    """A rank sees rank + 1 chunks of keys from one of its chunks, and 2 * size - rank from the other."""
    for joined, apart in run_ranks(size, blocks_of_gathered_attention, size):
        assert apart == 2 * size + 1
        # Of each of the two chunks of queries: what is visible as a whole, and the triangle.
        assert joined <= 4
