"""Bytes and calls of each exchange, counted where they are sent, equal the closed forms."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.context_parallel.plan import visible_band
from tests.distributed.pool import run_ranks
from tests.unit_tests.context_parallel.split_traffic import SplitSizes, attention_traffic
from tests.unit_tests.context_parallel.split_world import (
    BATCH,
    HEADS,
    WIDTH,
    Case,
    build,
    document_mask,
    operands,
    part,
    start,
)


class Counter:
    """Stands in for the operations of torch.distributed, adding up what this rank sends to others."""

    def __init__(self, patch):
        self.calls: dict[str, int] = {}
        self.sent = 0
        for name in ("batch_isend_irecv", "all_to_all_single"):
            patch.setattr(dist, name, self.counted(name, getattr(dist, name)))
        for new, old in (
            ("all_gather_single", "all_gather_into_tensor"),
            ("reduce_scatter_single", "reduce_scatter_tensor"),
        ):
            name = new if hasattr(dist, new) else old
            patch.setattr(dist, name, self.counted(old, getattr(dist, name)))
        for name in ("all_reduce", "broadcast", "all_gather", "all_gather_object", "isend", "send"):
            patch.setattr(dist, name, self.refused(name))

    def counted(self, name, operation):
        def run(*args, **kwargs):
            self.calls[name] = self.calls.get(name, 0) + 1
            self.sent += self.bytes_sent(name, args, kwargs.get("group"))
            return operation(*args, **kwargs)

        return run

    def refused(self, name):
        def run(*args, **kwargs):
            raise AssertionError(f"{name} is not part of any exchange")

        # P2POp compares with the functions themselves.
        return getattr(dist, name) if name == "isend" else run

    @staticmethod
    def bytes_sent(name, args, group):
        if name == "batch_isend_irecv":
            return sum(op.tensor.nbytes for op in args[0] if op.op is dist.isend)
        ranks = dist.get_world_size(group)
        # [output, input]: a gather sends its input to all others, the other two all but their own part of it.
        return args[1].nbytes * (ranks - 1) // (1 if name == "all_gather_into_tensor" else ranks)


def sent(cases):
    """On a rank: (bytes and calls of forward, of backward) for every case."""
    size, found = dist.get_world_size(), []
    for case in cases:
        rank = start(size, case.hierarchy)
        layer = build(case, size)
        inputs = [part(t, rank, size).requires_grad_() for t in operands(case, size)]
        grad = inputs.pop()
        length = 2 * size * case.chunk
        mask = part(document_mask(length), rank, size, dim=2) if case.mask else None
        with pytest.MonkeyPatch.context() as patch:
            counter = Counter(patch)
            out = layer(*inputs, mask)
            forward = (counter.sent, dict(counter.calls))
            counter.sent, counter.calls = 0, {}
            out.backward(grad)
            found.append((forward, (counter.sent, counter.calls)))
    return found


WORLD = 4
CASES = [
    *(Case(kind, groups=groups) for kind in ("p2p", "all_gather", "a2a") for groups in (4, 2, 1)),
    *(Case("p2p", groups=2, window=window) for window in ((2, 0), (0, 0), (7, 0))),
    *(Case("a2a+p2p", groups=groups, hierarchy=(2, 2)) for groups in (4, 2, 1)),
    Case("a2a+p2p", window=(2, 0), hierarchy=(2, 2)),
    Case("p2p", dtype="bfloat16"),
    Case("a2a", dtype="bfloat16", value_width=WIDTH * 2),
    Case("all_gather", value_width=WIDTH * 2),
]


def test_sent_bytes_equal_the_closed_form():
    for answers in zip(CASES, *run_ranks(WORLD, sent, CASES), strict=True):
        case, by_rank = answers[0], answers[1:]
        local = 2 * case.chunk
        sizes = SplitSizes(
            tokens=local * BATCH,
            heads=HEADS,
            groups=case.groups,
            width=WIDTH,
            value_width=case.value_width,
            element_bytes=getattr(torch, case.dtype).itemsize,
        )
        expected = attention_traffic(
            case.kind,
            sizes,
            WORLD,
            local_length=local,
            band=visible_band(case.causal, case.window),
            inner=case.hierarchy[0] if case.hierarchy else 1,
        )
        for forward, backward in by_rank:
            assert forward[0] == expected.forward_bytes, case
            assert backward[0] == expected.backward_bytes, case


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        # Keys of 6 positions x 2 sequences x 2 groups x (8 + 8) x 4 bytes, three hops.
        (Case("p2p", groups=2), (3 * 1536, {"batch_isend_irecv": 3}), (6 * 1536, {"batch_isend_irecv": 6})),
        # Neighbours only.
        (
            Case("p2p", groups=2, window=(2, 0)),
            (2 * 1536, {"batch_isend_irecv": 2}),
            (4 * 1536, {"batch_isend_irecv": 4}),
        ),
        (Case("p2p", window=(0, 0)), (0, {}), (0, {})),
        (
            Case("all_gather", groups=2),
            (3 * 1536, {"all_gather_into_tensor": 1}),
            (6 * 1536, {"all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}),
        ),
        # Queries, results, and keys and values copied to one head a rank: 1536 each, three quarters of it.
        (
            Case("a2a", groups=2),
            (3 * 1536, {"all_to_all_single": 2}),
            (3 * 1536, {"all_to_all_single": 2}),
        ),
        # Half of queries, keys with values, and results; one hop of the keys of 12 positions and one head.
        (
            Case("a2a+p2p", groups=2, hierarchy=(2, 2)),
            (3 * 768 + 1536, {"all_to_all_single": 2, "batch_isend_irecv": 1}),
            (3 * 768 + 2 * 1536, {"all_to_all_single": 2, "batch_isend_irecv": 2}),
        ),
        # The mask: 6 x 24 booleans of 2 sequences.
        (
            Case("a2a", groups=2, mask="documents"),
            (3 * 1536 + 3 * 288, {"all_to_all_single": 2, "all_gather_into_tensor": 1}),
            (3 * 1536, {"all_to_all_single": 2}),
        ),
    ],
    ids=lambda value: f"{value.kind}-{value.window}-{value.mask}" if isinstance(value, Case) else None,
)
def test_by_hand(case, forward, backward):
    for found in run_ranks(WORLD, sent, [case]):
        assert found == [(forward, backward)]


def saved_bytes(case):
    """On a rank: what forward keeps for backward, besides its own inputs."""
    size = dist.get_world_size()
    rank = start(size)
    layer = build(case, size)
    inputs = [part(t, rank, size).requires_grad_() for t in operands(case, size)[:3]]
    own = {t.untyped_storage().data_ptr() for t in inputs}
    kept = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(*inputs, None)
    return sum(kept.values())


@pytest.mark.parametrize("kind", ["p2p", "all_gather"])
def test_memory(kind):
    """Nothing that grows with the whole sequence: the result, and one number per query and head."""
    case = Case(kind, chunk=32)
    queries = 64 * BATCH * HEADS
    for kept in run_ranks(2, saved_bytes, case):
        assert kept == queries * (WIDTH + 1) * 4
