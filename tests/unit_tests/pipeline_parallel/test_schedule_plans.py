"""Schedules as data: what they contain, that they cannot hang, and what they hold in memory."""

import itertools
from dataclasses import replace

import pytest

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.actions import Compute, Exchange, Message, PassKind, StartSync
from megatron.core.pipeline_parallel.checker import ScheduleError, check_schedules, simulate
from megatron.core.pipeline_parallel.orders import ONE_CHUNK_ORDERS, SCHEDULES
from megatron.core.pipeline_parallel.planning import make_schedule, make_schedules, place_in_exchange


def words(actions):
    """F0 B0 ... of one rank; chunks above the first as F0'1."""
    return " ".join(
        f"{a.kind.value}{a.microbatch}" + (f"'{a.chunk}" if a.chunk else "")
        for a in actions
        if isinstance(a, Compute)
    )


# Drawn by hand from figures 3 and 4 of Narayanan et al. 2021 and figure 2 of Qi et al. 2023.
BY_HAND = {
    ("1f1b", 2, 3, 1): ["F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2"],
    ("1f1b", 3, 2, 1): ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"],
    ("interleaved", 2, 2, 2): [
        "F0 F1 F0'1 F1'1 B0'1 B1'1 B0 B1",
        "F0 F1 F0'1 B0'1 F1'1 B1'1 B0 B1",
    ],
    ("zb-h1", 2, 3, 1): ["F0 F1 I0 W0 F2 I1 W1 I2 W2", "F0 I0 F1 I1 W0 F2 I2 W1 W2"],
}


@pytest.mark.parametrize("request_", BY_HAND)
def test_orders_drawn_by_hand(request_):
    assert [words(actions) for actions in make_schedules(*request_)] == BY_HAND[request_]


def test_transfers_of_two_stages_and_two_microbatches():
    def to(peer, gradient, k):
        return Message(True, gradient, k, 0, peer)

    def of(peer, gradient, k):
        return Message(False, gradient, k, 0, peer)

    def without_syncs(actions):
        return [a for a in actions if not isinstance(a, StartSync)]

    first, last = (without_syncs(actions) for actions in make_schedules("1f1b", 2, 2))
    assert [a.messages for a in first if isinstance(a, Exchange)] == [
        (to(1, False, 0),),
        (to(1, False, 1),),
        (of(1, True, 0),),
        (of(1, True, 1),),
    ]
    assert [a.messages for a in last if isinstance(a, Exchange)] == [
        (of(0, False, 0),),
        (of(0, False, 1),),
        (to(0, True, 0),),
        (to(0, True, 1),),
    ]


@pytest.mark.parametrize("name", ONE_CHUNK_ORDERS)
def test_no_rank_of_a_schedule_waits_for_ever(name):
    for p, m in itertools.product((1, 2, 3, 4, 8), (1, 2, 3, 5, 17)):
        check_schedules(make_schedules(name, p, m), m)


PLAIN = [(name, p, m) for name in ("1f1b", "zb-h1") for p in (1, 2, 3, 4, 5, 8) for m in (1, 2, 3, 5, 8, 17)]


@pytest.mark.parametrize(("name", "p", "m"), PLAIN)
def test_plain_schedules_are_proved_and_hold_no_more_than_their_share(name, p, m):
    report = check_schedules(make_schedules(name, p, m), m)
    assert report.num_messages == 2 * (p - 1) * m
    # 1F1B: rank r keeps the micro-batches of the later stages and its own.
    in_flight = [min(p - rank, m) for rank in range(p)]
    assert report.peak_outputs_waiting == in_flight
    most = in_flight if name == "1f1b" else [min(p, m)] * p
    assert report.peak_activations == most


INTERLEAVED = [
    (p, m, v, group)
    for p in (2, 3, 4, 5)
    for v in (1, 2, 3, 4)
    for m in (p, 2 * p, 3 * p)
    for group in (p, p + 1)
    if m % group == 0 or m % group >= p
]


@pytest.mark.parametrize(("p", "m", "v", "group"), INTERLEAVED)
def test_interleaved_schedules_are_proved(p, m, v, group):
    report = check_schedules(make_schedules("interleaved", p, m, v, group), m, v)
    assert report.num_messages == 2 * (p * v - 1) * m
    # One more than the warm-up: two per later stage, and all but the last chunk of a group.
    most = [min(2 * (p - rank - 1) + (v - 1) * group + 1, m * v) for rank in range(p)]
    assert report.peak_activations == most


@pytest.mark.parametrize("remainder", [1, 2])
def test_a_last_group_smaller_than_the_pipeline_works_or_is_refused(remainder):
    """Never a schedule that hangs: some such numbers work, the others are refused when they are planned."""
    worked = refused = 0
    for p in (3, 4, 5, 6):
        for v in (2, 3, 4):
            m = 2 * p + remainder
            try:
                check_schedules(make_schedules("interleaved", p, m, v), m, v)
                worked += 1
            except ConfigError as error:
                assert "micro-batches" in str(error)
                refused += 1
    assert worked and refused


@pytest.mark.parametrize(
    ("name", "p", "m", "v"), [("1f1b", 4, 6, 1), ("zb-h1", 3, 5, 1), ("interleaved", 3, 6, 2)]
)
def test_forward_only_has_forward_passes_only(name, p, m, v):
    schedules = make_schedules(name, p, m, v, forward_only=True)
    report = check_schedules(schedules, m, v)
    assert report.num_messages == (p * v - 1) * m
    assert {a.kind for actions in schedules for a in actions if isinstance(a, Compute)} == {PassKind.FORWARD}
    assert not any(isinstance(a, StartSync) and a.gradients for actions in schedules for a in actions)


@pytest.mark.parametrize(
    ("name", "p", "m", "v"), [("1f1b", 4, 6, 1), ("zb-h1", 4, 6, 1), ("interleaved", 4, 8, 3)]
)
def test_collectives_start_once_per_chunk_and_gradients_only_when_complete(name, p, m, v):
    for actions in make_schedules(name, p, m, v):
        syncs = [a for a in actions if isinstance(a, StartSync)]
        assert sorted(a.chunk for a in syncs if a.gradients) == list(range(v))
        assert sorted(a.chunk for a in syncs if not a.gradients) == list(range(v))
        for sync in syncs:
            rest = actions[actions.index(sync) :]
            later = [a.kind for a in rest if isinstance(a, Compute) and a.chunk == sync.chunk]
            if sync.gradients:
                assert later == []
            else:
                assert later.count(PassKind.FORWARD) == m


def test_edges_of_one_colour_share_no_rank_and_one_end_sends_first():
    for p in range(2, 9):
        edges = {tuple(sorted((r, (r + 1) % p))) for r in range(p)}
        colours = {}
        for low, high in edges:
            places = {
                (rank, send): place_in_exchange(Message(send, False, 0, 0, peer), rank, p)
                for rank, peer in ((low, high), (high, low))
                for send in (True, False)
            }
            assert len({colour for colour, _ in places.values()}) == 1
            assert places[low, True] < places[low, False] and places[high, False] < places[high, True]
            colours.setdefault(places[low, True][0], []).append({low, high})
        for same in colours.values():
            assert sum(len(edge) for edge in same) == len(set().union(*same))


def edited(p, m, rank, edit):
    schedules = [list(actions) for actions in make_schedules("1f1b", p, m)]
    schedules[rank] = edit(schedules[rank])
    return schedules


def position(actions, kind, microbatch):
    return actions.index(Compute(kind, microbatch, 0))


def swapped(a, b):
    def edit(actions):
        i, j = (position(actions, *place) for place in (a, b))
        actions[i], actions[j] = actions[j], actions[i]
        return actions

    return edit


def with_exchanges(change):
    def edit(actions):
        exchanges = [a for a in actions if isinstance(a, Exchange)]
        return [change(a, exchanges.index(a)) if isinstance(a, Exchange) else a for a in actions]

    return edit


def other_microbatch(exchange, number):
    if number:
        return exchange
    first, *rest = exchange.messages
    return Exchange((replace(first, microbatch=1), *rest))


BROKEN = {
    "backward missing": (
        1,
        lambda actions: [a for a in actions if a != Compute(PassKind.BACKWARD, 2, 0)],
        "some micro-batches run backward and some do not",
    ),
    "backward first": (1, swapped((PassKind.FORWARD, 1), (PassKind.BACKWARD, 1)), "not F, FB or FIW"),
    "input not there": (1, lambda actions: actions[1:3] + actions[:1] + actions[3:], "before its input"),
    "sent what is not made": (0, with_exchanges(other_microbatch), "before it is computed"),
    "no transfers": (
        1,
        lambda actions: [a for a in actions if not isinstance(a, Exchange)],
        "before its input has arrived",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_checker_finds(name):
    rank, edit, message = BROKEN[name]
    with pytest.raises(ScheduleError, match=message):
        check_schedules(edited(2, 3, rank, edit), 3)


def exchange(*messages):
    return Exchange(tuple(Message(send, False, k, 0, peer) for send, k, peer in messages))


def test_the_checker_finds_messages_that_overtake_each_other():
    first, last = (list(actions) for actions in make_schedules("1f1b", 2, 2))
    messages = [a for a in first if isinstance(a, Exchange)][:2]
    i, j = first.index(messages[0]), first.index(messages[1])
    # Both activations leave after both forward passes, in the wrong order.
    first[i : j + 1] = [first[i + 1], messages[1], messages[0]]
    with pytest.raises(ScheduleError, match=r"sent .* but received"):
        check_schedules([first, last], 2)


def test_two_ranks_that_send_first_hang_only_without_buffers():
    both = [[exchange((True, 0, 1), (False, 0, 1))], [exchange((True, 0, 0), (False, 0, 0))]]
    simulate(both, sending_waits=False)
    with pytest.raises(ScheduleError, match=r"deadlock: rank 0 .* rank 1"):
        simulate(both, sending_waits=True)


def test_two_ranks_that_receive_first_hang_in_any_case():
    both = [[exchange((False, 0, 1), (True, 0, 1))], [exchange((False, 0, 0), (True, 0, 0))]]
    for sending_waits in (False, True):
        with pytest.raises(ScheduleError, match="deadlock"):
            simulate(both, sending_waits)


def run_as_groups(schedules):
    """Exchanges as kernels on one stream per rank: each ends when all its messages have met their other ends.

    A message meets its other end while the kernels of both are the first ones on their streams.

    Returns:
        Number of exchanges of each rank that never end.
    """
    waiting = [[a.messages for a in actions if isinstance(a, Exchange)] for actions in schedules]
    met = set()
    moved = True
    while moved:
        moved = False
        for rank, kernels in enumerate(waiting):
            for message in kernels[0] if kernels else ():
                answers = waiting[message.peer][0] if waiting[message.peer] else ()
                if (rank, message) not in met and any(
                    answer.peer == rank
                    and answer.send != message.send
                    and (answer.gradient, answer.microbatch) == (message.gradient, message.microbatch)
                    for answer in answers
                ):
                    met.add((rank, message))
                    moved = True
        for rank, kernels in enumerate(waiting):
            while kernels and all((rank, message) in met for message in kernels[0]):
                del kernels[0]
    return [len(kernels) for kernels in waiting]


@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize(
    ("name", "v", "group"),
    [("1f1b", 1, None), ("zb-h1", 1, None), ("interleaved", 2, None), ("interleaved", 3, 5)],
)
@pytest.mark.parametrize("p", [2, 3, 4, 5])
def test_batches_end_where_a_backend_runs_each_as_one_kernel(p, name, v, group, forward_only):
    for m in (p, 2 * p):
        schedules = make_schedules(name, p, m, v, group, forward_only)
        assert run_as_groups(schedules) == [0] * p
        for actions in schedules:
            # A communicator is made by all ranks together, in the first exchange of each.
            before = actions[: next(i for i, action in enumerate(actions) if isinstance(action, Exchange))]
            assert all(isinstance(a, StartSync) or a.kind is PassKind.FORWARD for a in before)


def test_batches_in_another_order_hang_as_kernels():
    first, last = (
        [exchange((True, 0, 1)), exchange((True, 1, 1))],
        [exchange((False, 1, 0)), exchange((False, 0, 0))],
    )
    assert run_as_groups([first, last]) == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpipe", 2, 4), "not one of " + ", ".join(SCHEDULES)),
        (("1f1b", 2, 4, 2), "use interleaved"),
        (("zb-h1", 2, 4, 2), "use interleaved"),
        (("1f1b", 2, 0), "at least 1"),
        (("interleaved", 4, 8, 2, 3), "microbatch_group_size_per_vp_stage 3"),
    ],
)
def test_requests_that_cannot_work(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_schedules(*arguments)


def test_one_rank_of_all():
    assert make_schedule("interleaved", 2, 1, 4, 2) == list(make_schedules("interleaved", 2, 4, 2)[1])


@pytest.mark.slow
@pytest.mark.parametrize("p", range(1, 13))
def test_schedules_of_many_sizes_have_no_deadlock(p):
    for m in range(1, 3 * p + 2):
        for name in ("1f1b", "zb-h1"):
            check_schedules(make_schedules(name, p, m), m)
    for v in (2, 3, 5) if p > 1 else ():
        for m in range(p, 4 * p + 1, p):
            check_schedules(make_schedules("interleaved", p, m, v), m, v)
