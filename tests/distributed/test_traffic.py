"""Bytes and calls of every collective of a step of the real loop equal the closed forms: nothing hidden.

A step here is everything between the starts of two training steps, so also what the loop itself might send.
"""

import contextlib
from unittest import mock

import pytest
import torch.distributed as dist

from tests.distributed import closed_forms as forms
from tests.distributed import real_loop
from tests.distributed.expert_layouts import bare
from tests.distributed.gpt_run import NO_DROPOUT, command_line
from tests.distributed.layouts import LAYERS, PADDED_VOCAB, SEQUENCE, Layout
from tests.distributed.pool import run_ranks
from tests.distributed.traffic import Kind, add, metered, times

# Width between layers, width of keys (that of values is the same), learned positions, elements of a layer's
# norms and of biases that every tensor-parallel rank holds, and elements of the last norm.
SHAPES = {"gpt": (32, 32, True, 6 * 32, 2 * 32), "llama": (64, 32, False, 2 * 64, 64)}
SHAPES["moe"] = SHAPES["llama"]
EXPERTS, EXPERT_WIDTH, TOPK = 4, 32, 2  # of the model "moe"
BUCKET = 3000
BATCH = 4
# A step is metered until the next one starts; the first is left out.
EXTRA = f"{NO_DROPOUT} --log-interval 100 --train-iters 3 --micro-batch-size 1 --global-batch-size {BATCH}"


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def steps(argv):
    """On a rank: traffic of each step but the first and the last."""
    from megatron.training import training

    step, meters, found = training.train_step, [], []
    with contextlib.ExitStack() as stack:

        def metered_step(*args, **kwargs):
            if meters:
                found.append(meters[0].take())
            else:
                meters.append(stack.enter_context(metered()))
            return step(*args, **kwargs)

        stack.enter_context(mock.patch.object(training, "train_step", metered_step))
        real_loop.train(argv, with_gradients=False)
    return found[1:]


class Place:
    """Where a rank stands, by the order tp-cp-dp-pp."""

    def __init__(self, layout, rank):
        self.layout, self.rank = layout, rank
        self.strides = {"tp": 1, "cp": layout.tp}
        self.strides["dp"] = self.strides["cp"] * layout.cp
        self.strides["pp"] = self.strides["dp"] * layout.dp

    def index(self, axis):
        return self.rank // self.strides[axis] % self.layout.sizes[axis]

    def group(self, *axes):
        """Ranks that differ from this one along ``axes`` only."""
        ranks = [self.rank]
        for axis in axes:
            stride = self.strides[axis]
            ranks = [
                rank + (place - self.index(axis)) * stride
                for rank in ranks
                for place in range(self.layout.sizes[axis])
            ]
        return tuple(sorted(ranks))

    def neighbour(self, axis, distance):
        group = self.group(axis)
        return group[(self.index(axis) + distance) % len(group)]

    def expert_group(self, *axes):
        """The same for the axes of experts, etp-ep-edp within a stage."""
        within = self.layout.tp * self.layout.cp * self.layout.dp
        parts, spread = expert_sizes(self.layout)
        sizes = {"etp": parts, "ep": spread, "edp": within // parts // spread, "pp": self.layout.pp}

        def places(rank):
            return {
                "etp": rank % parts,
                "ep": rank // parts % spread,
                "edp": rank % within // parts // spread,
                "pp": rank // within,
            }

        mine = places(self.rank)
        fixed = [axis for axis in sizes if axis not in axes]
        return tuple(
            rank
            for rank in range(self.layout.world_size)
            if all(places(rank)[axis] == mine[axis] for axis in fixed)
        )


def expert_sizes(layout):
    """Parts of each expert, and ranks with different experts."""
    return layout.tp if layout.etp is None else layout.etp, layout.ep


def expected(layout, rank, chunks=1):
    """Traffic of one step, all reasons together; matmuls of split layers in some chunks."""
    place = Place(layout, rank)
    stage, tp = place.index("pp"), place.group("tp")
    first, last = stage == 0, stage == layout.pp - 1
    width, _, learned, norms, last_norm = SHAPES[layout.model]
    layers, length, microbatches = LAYERS // layout.pp, SEQUENCE // layout.cp, BATCH // layout.dp
    activation = length * width * forms.NUMBER
    each = [forms.batch(tp, SEQUENCE, first, last), *(_attention(layout, place) for _ in range(layers))]
    if layout.sequence_parallel:
        each.append(forms.sequence_parallel(tp, layers, activation, first, last, learned, chunks))
    elif layout.tp > 1:
        each.append(forms.tensor_parallel(tp, layers, activation, first, last, chunks))
    if last:
        each.append(forms.split_vocabulary_loss(tp, length))
        each.append(forms.reported_loss(place.group("cp"), place.group("dp")))
    step = [times(add(*each), microbatches)]
    if layout.pp > 1:
        sent = activation // (layout.tp if layout.sequence_parallel else 1)
        around = place.neighbour("pp", -1), place.neighbour("pp", 1)
        step.append(forms.pipeline(*around, stage, layout.pp, layout.vpp, microbatches, sent))
    mixed = _layers_with_experts(layout, first)
    if layout.sequence_parallel:
        # A router and the gate of a shared expert see parts of the sequence as norms do.
        routers = mixed * (EXPERTS + 1) * width
        step.append(forms.replicated_gradients(tp, layers * norms + routers + last * last_norm))
    if mixed:
        step.append(times(_experts(layout, place), mixed * microbatches))
        model_groups = place.group("tp", "pp"), place.expert_group("etp", "ep", "pp")
        step.append(forms.experts_norm(*model_groups, layout.reduction.startswith("sharded")))
    if layout.pp > 1 and layout.model == "gpt" and (first or last):
        ends = (place.group("pp")[0], place.group("pp")[-1])
        step.append(forms.tied_embedding(ends, PADDED_VOCAB * width // layout.tp))
    return add(*step, *_gradients(layout, place, first, last), _end(layout, place))


def _attention(layout, place):
    """One layer, one microbatch; heads are split over tensor-parallel ranks."""
    if layout.cp == 1:
        return {}
    width, key_width, *_ = SHAPES[layout.model]
    part = SEQUENCE // layout.cp * forms.NUMBER // layout.tp  # bytes of one feature of this rank's part
    cp, keys_and_values = place.group("cp"), 2 * key_width * part
    if layout.context == "p2p":
        return forms.ring_attention(place.neighbour("cp", 1), keys_and_values, layout.cp)
    if layout.context == "all_gather":
        return forms.gathered_attention(cp, keys_and_values * layout.cp)
    if layout.context == "a2a":
        return forms.head_exchange(cp, width * part, keys_and_values)
    # Two levels: heads within pairs; then each holds twice the sequence of half the heads, and the ring has
    # every second rank.
    index = place.index("cp")
    pair = tuple(place.neighbour("cp", distance - index % 2) for distance in (0, 1))
    return add(
        forms.head_exchange(pair, width * part, keys_and_values),
        forms.ring_attention(place.neighbour("cp", 2), keys_and_values, layout.cp // 2),
    )


def _layers_with_experts(layout, first):
    """Of a stage; the first layer of the model has none."""
    return LAYERS // layout.pp - first if layout.model == "moe" else 0


def _experts(layout, place):
    """One layer, one microbatch; every rank gives as many tokens to every expert."""
    width, *_ = SHAPES["moe"]
    tokens, sharing = SEQUENCE // layout.cp // layout.tp, place.expert_group("etp", "ep")
    if "allgather" in layout.experts:
        return forms.gathered_experts(sharing, tokens, width, EXPERTS)
    groups = sharing, place.expert_group("ep"), place.expert_group("etp")
    return forms.exchanged_experts(*groups, tokens * TOPK, width, EXPERTS)


def _gradients_with_experts(layout, place, first, last):
    width, keys, *_ = SHAPES["moe"]
    mixed = _layers_with_experts(layout, first)
    dense = forms.moe_parameters(int(first), mixed, width, keys, PADDED_VOCAB, layout.tp, first, last)
    parts, spread = expert_sizes(layout)
    one = [2 * EXPERT_WIDTH * width // parts, EXPERT_WIDTH * width // parts]
    sharded, found = layout.reduction.startswith("sharded"), []
    for replicas, sizes in (
        (place.group("dp", "cp"), dense),
        (place.expert_group("edp"), one * (mixed * EXPERTS // spread)),
    ):
        buckets = forms.bucket_sizes(sizes, None, len(replicas) if sharded else 1)
        found.append((forms.sharded_optimizer if sharded else forms.reduced_gradients)(replicas, buckets))
    return found


def _gradients(layout, place, first, last):
    if layout.model == "moe":
        return _gradients_with_experts(layout, place, first, last)
    replicas = place.group("dp", "cp")
    if len(replicas) == 1:
        return []
    assert layout.model == "gpt" and layout.vpp == 1
    width = SHAPES["gpt"][0]
    parameters = forms.gpt_parameters(
        LAYERS // layout.pp, width, PADDED_VOCAB, SEQUENCE, layout.tp, first, last
    )
    sharded = layout.reduction.startswith("sharded")
    # Later stages have nothing to hide a reduction behind that others do not wait for: one bucket.
    bucket = BUCKET if "overlap" in layout.reduction and first else None
    tied = ((0,) if first else ()) + ((len(parameters) - 1,) if last else ())
    alone = tied if sharded and layout.pp > 1 else ()
    sizes = forms.bucket_sizes(parameters, bucket, len(replicas) if sharded else 1, alone)
    return [(forms.sharded_optimizer if sharded else forms.reduced_gradients)(replicas, sizes)]


def _end(layout, place):
    everybody = tuple(range(layout.world_size))
    return forms.end_of_step(place.group("tp", "pp"), everybody, layout.reduction.startswith("sharded"))


LAYOUTS = [
    Layout(tp=2),
    Layout(tp=4, model="llama"),
    Layout(tp=2, sequence_parallel=True),
    Layout(tp=2, sequence_parallel=True, model="llama"),
    Layout(pp=2),
    Layout(pp=4),
    Layout(pp=2, vpp=2),
    Layout(pp=2, vpp=2, pipeline="no-overlap"),
    Layout(pp=2, pipeline="zb-h1"),
    Layout(cp=2),
    Layout(cp=4),
    Layout(cp=4, context="a2a"),
    Layout(cp=4, context="all_gather"),
    Layout(cp=4, context="a2a+p2p"),
    Layout(dp=4),
    Layout(dp=2, reduction="overlap-reduce"),
    Layout(dp=4, reduction="sharded"),
    Layout(dp=2, reduction="sharded-overlap-reduce"),
    Layout(dp=2, reduction="sharded-overlap-both"),
    Layout(cp=2, dp=2, reduction="sharded"),
    Layout(tp=2, pp=2, dp=2, sequence_parallel=True, reduction="sharded-overlap-both"),
    Layout(tp=2, pp=2, cp=2, context="a2a"),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_sends_what_the_closed_forms_say(layout, data_cache):
    argv = command_line(layout, data_cache, EXTRA)
    for rank, found in enumerate(run_ranks(layout.world_size, steps, argv)):
        (traffic,) = found
        assert traffic == expected(layout, rank), f"rank {rank}"


_EXCHANGED, _GATHERED = (f"--moe-token-dispatcher-type {name}" for name in ("alltoall", "allgather"))
EXPERT_LAYOUTS = [
    bare(dp=2, ep=2, experts=_EXCHANGED),
    bare(dp=2, ep=2, reduction="sharded", experts=_GATHERED),
    bare(tp=2, dp=2, ep=2, experts=_EXCHANGED),
    bare(tp=2, dp=2, ep=2, experts=_GATHERED),
    bare(tp=2, ep=2, etp=1, experts=_EXCHANGED),
    bare(dp=4, ep=2, experts=_GATHERED),
    bare(dp=4, ep=2, reduction="sharded", experts=_EXCHANGED),
    bare(pp=2, dp=2, ep=2, experts=_EXCHANGED),
    bare(cp=2, ep=2, experts=_GATHERED),
]


@pytest.mark.parametrize(
    "layout", EXPERT_LAYOUTS, ids=[str(each).replace("-" * 3, "") for each in EXPERT_LAYOUTS]
)
def test_a_step_with_experts_sends_what_the_closed_forms_say(layout, data_cache):
    argv = command_line(layout, data_cache, f"{EXTRA} --moe-router-force-load-balancing")
    for rank, (traffic,) in enumerate(run_ranks(layout.world_size, steps, argv)):
        assert traffic == expected(layout, rank), f"rank {rank}"


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize(
    "layout", [Layout(tp=2, model="llama"), Layout(tp=2, pp=2, sequence_parallel=True)], ids=str
)
def test_chunks_send_the_same_bytes_in_more_messages(layout, chunks, data_cache):
    argv = command_line(layout, data_cache, f"{EXTRA} --use-ascend-coc --coc-parallel-num {chunks}")
    for rank, (traffic,) in enumerate(run_ranks(layout.world_size, steps, argv)):
        assert traffic == expected(layout, rank, chunks), f"rank {rank}"


def test_one_rank_sends_nothing(data_cache):
    argv = command_line(Layout(), data_cache, EXTRA)
    assert run_ranks(1, steps, argv) == [[{}]]


def uncounted():
    """On a rank: what the meter says of a message that passes by its wrappers."""
    import torch

    with metered() as meter:
        dist.all_reduce(torch.zeros(3))
        counted = meter.take()
        dist.group.WORLD.allreduce([torch.zeros(3)]).wait()
        with pytest.raises(AssertionError, match="1 messages were sent, 0 of them"):
            meter.take()
    return counted


def test_every_collective_is_counted():
    for counted in run_ranks(2, uncounted):
        assert [(kind, amount.calls, amount.total_bytes) for kind, amount in counted.items()] == [
            (Kind("all_reduce", (0, 1)), 1, 12)
        ]


def test_buckets_by_hand():
    # Filled from the last: 100 -> starts 0; 50 starts at 128; 200 at 192: ends at 392, rounded to 512.
    assert forms.bucket_sizes([200, 50, 100], None, 2) == [512]
    assert forms.bucket_sizes([200, 50, 100], None, 1) == [350]
    assert forms.bucket_sizes([200, 50, 100], 150, 1) == [150, 200]
    assert forms.bucket_sizes([200, 50, 100], 1000, 2, alone=(0,)) == [256, 256]
