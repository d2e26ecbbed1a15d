"""Schedules of all pipeline ranks: computations, the transfers between them, and the starts of collectives.

A clock runs through the orders of all ranks; every computation ends at a tick. What ends at a tick is
exchanged right after it: an activation or gradient leaves its rank with the exchange of the tick that made
it, and its receiver takes part in the exchange of the *same* tick. Exchanges are therefore in one order
everywhere, whatever the orders of computation are, and none waits for a later one: no cycle, and no
message that overtakes another between two ranks. Ticks only tell in which order things happen; nobody
waits for a clock.

Inside an exchange the neighbours are served by the colour of the edge that joins them, so that transfers
which a backend runs one by one pair up as well: edges of one colour share no rank, and on an edge the
lower rank sends first.
"""

from collections import defaultdict, deque
from functools import lru_cache

from megatron.core.errors import UsageError
from megatron.core.pipeline_parallel.actions import Action, Compute, Exchange, Message, PassKind, StartSync
from megatron.core.pipeline_parallel.orders import ONE_CHUNK_ORDERS, SCHEDULES, one_forward_one_backward

# (done forward?, micro-batch, virtual stage): what other computations wait for.
_Event = tuple[bool, int, int]
# Nominal times, from which only the order of exchanges follows.
_TIMES = {PassKind.FORWARD: 1, PassKind.BACKWARD: 2, PassKind.INPUT_GRADIENT: 1, PassKind.WEIGHT_GRADIENT: 1}


def make_schedule(
    name: str,
    num_stages: int,
    rank: int,
    num_microbatches: int,
    num_chunks: int = 1,
    group_size: int | None = None,
    forward_only: bool = False,
) -> list[Action]:
    """What pipeline rank ``rank`` does in one step.  Arguments as of :func:`make_schedules`."""
    return list(
        make_schedules(name, num_stages, num_microbatches, num_chunks, group_size, forward_only)[rank]
    )


@lru_cache(maxsize=8)
def make_schedules(
    name: str,
    num_stages: int,
    num_microbatches: int,
    num_chunks: int = 1,
    group_size: int | None = None,
    forward_only: bool = False,
) -> tuple[tuple[Action, ...], ...]:
    """What every pipeline rank does in one step.

    Args:
        name: one of :data:`SCHEDULES`.
        num_stages: pipeline ranks ``p``; with one there is nothing to exchange.
        num_microbatches: ``m``.
        num_chunks: virtual stages per rank ``v``, 1 unless interleaved.
        group_size: micro-batches that pass a chunk back to back, default ``p``; interleaved only.
        forward_only: leave out everything backward.

    Raises:
        UsageError: the schedule does not exist, or these numbers would leave ranks waiting for each other.
    """
    _check_request(name, num_stages, num_microbatches, num_chunks, group_size)
    chunks = num_chunks if name == "interleaved" else None
    orders = [
        one_forward_one_backward(num_stages, rank, num_microbatches, chunks, group_size, forward_only)
        if forward_only or name == "interleaved"
        else ONE_CHUNK_ORDERS[name](num_stages, rank, num_microbatches)
        for rank in range(num_stages)
    ]
    ticks = _ticks(orders, num_stages * num_chunks)
    exchanges = _exchanges(orders, ticks, num_stages * num_chunks)
    return tuple(
        tuple(_merge(order, at, exchanges[rank], _sync_points(order, rank, num_chunks)))
        for rank, (order, at) in enumerate(zip(orders, ticks, strict=True))
    )


def _check_request(
    name: str, num_stages: int, num_microbatches: int, num_chunks: int, group_size: int | None
) -> None:
    if name not in SCHEDULES:
        raise UsageError(f"pipeline_schedule {name}: not one of {', '.join(SCHEDULES)}")
    if name != "interleaved" and num_chunks != 1:
        raise UsageError(
            f"pipeline_schedule {name} runs one model chunk per pipeline rank, but there are {num_chunks}: "
            "use interleaved, or leave out the virtual stages"
        )
    if min(num_stages, num_microbatches, num_chunks) < 1:
        raise UsageError(
            f"a schedule of {num_stages} stages, {num_microbatches} micro-batches, {num_chunks} chunks: "
            "each must be at least 1"
        )
    if group_size is not None and group_size < num_stages and name == "interleaved":
        raise UsageError(
            f"microbatch_group_size_per_vp_stage {group_size}: at least {num_stages}, "
            "the number of pipeline stages, is needed, or the first stage waits for its own output"
        )


def _event_of(compute: Compute, stage: int) -> _Event | None:
    """What other computations can wait for; nothing waits for a weight gradient."""
    if compute.kind is PassKind.WEIGHT_GRADIENT:
        return None
    return compute.kind is PassKind.FORWARD, compute.microbatch, stage


def _needs(compute: Compute, stage: int, num_stages_total: int) -> list[_Event]:
    k = compute.microbatch
    if compute.kind is PassKind.FORWARD:
        return [(True, k, stage - 1)] if stage > 0 else []
    if compute.kind is PassKind.WEIGHT_GRADIENT:
        return [(False, k, stage)]
    return [(True, k, stage)] + ([(False, k, stage + 1)] if stage < num_stages_total - 1 else [])


def _ticks(orders: list[list[Compute]], num_stages_total: int) -> list[list[int]]:
    """The tick of the clock at which every computation ends: as early as its order and its inputs allow."""
    p = len(orders)
    done: dict[_Event, int] = {}
    ticks: list[list[int]] = [[] for _ in orders]
    waiting: dict[_Event, int] = {}
    ready = deque(range(p))
    while ready:
        rank = ready.popleft()
        while len(ticks[rank]) < len(orders[rank]):
            compute = orders[rank][len(ticks[rank])]
            stage = compute.chunk * p + rank
            needs = _needs(compute, stage, num_stages_total)
            missing = next((event for event in needs if event not in done), None)
            if missing is not None:
                waiting[missing] = rank
                break
            previous = ticks[rank][-1] if ticks[rank] else 0
            tick = _TIMES[compute.kind] + max([previous, *(done[event] for event in needs)])
            ticks[rank].append(tick)
            event = _event_of(compute, stage)
            if event is not None:
                done[event] = tick
                if event in waiting:
                    ready.append(waiting.pop(event))
    _check_finished(orders, ticks)
    return ticks


def _check_finished(orders: list[list[Compute]], ticks: list[list[int]]) -> None:
    stuck = [rank for rank, order in enumerate(orders) if len(ticks[rank]) < len(order)]
    if stuck:
        raise UsageError(
            f"these numbers of micro-batches and virtual stages leave pipeline ranks {stuck} waiting for "
            "each other: the last group of micro-batches may not be smaller than the "
            f"{len(orders)} pipeline stages; a multiple of {len(orders)} micro-batches always works"
        )


def _exchanges(
    orders: list[list[Compute]], ticks: list[list[int]], num_stages_total: int
) -> list[dict[int, Exchange]]:
    """Per rank: tick -> the exchange that follows it."""
    p = len(orders)
    messages: list[dict[int, list[Message]]] = [defaultdict(list) for _ in orders]
    for rank, order in enumerate(orders):
        for compute, tick in zip(order, ticks[rank], strict=True):
            stage = compute.chunk * p + rank
            gradient = compute.kind is not PassKind.FORWARD
            target = stage - 1 if gradient else stage + 1
            if compute.kind is PassKind.WEIGHT_GRADIENT or not 0 <= target < num_stages_total or p == 1:
                continue
            chunk, peer = divmod(target, p)
            messages[rank][tick].append(Message(True, gradient, compute.microbatch, compute.chunk, peer))
            messages[peer][tick].append(Message(False, gradient, compute.microbatch, chunk, rank))
    return [
        {
            tick: Exchange(tuple(sorted(found, key=lambda message: place_in_exchange(message, rank, p))))
            for tick, found in by_tick.items()
        }
        for rank, by_tick in enumerate(messages)
    ]


def place_in_exchange(message: Message, rank: int, num_stages: int) -> tuple[int, bool]:
    """Sort key of a message within its exchange: colour of the edge, then the lower rank's sending first."""
    low, high = sorted((rank, message.peer))
    closes_ring = low == 0 and high == num_stages - 1 and num_stages > 2
    # Neighbouring edges alternate; an odd ring needs a third colour for the edge that closes it.
    colour = high % 2 + 2 * (num_stages % 2) if closes_ring else low % 2
    return colour, message.send != (rank < message.peer)


def _sync_points(order: list[Compute], rank: int, num_chunks: int) -> dict[int, list[StartSync]]:
    """Position in the order -> collectives to start before it.

    A chunk's gradients are complete with its last backward pass, which rank ``r`` finishes about ``r`` passes
    earlier than the first rank: waiting for ``r`` more starts the collective everywhere at one time, and it
    does not slow stages that others wait for. Parameters are gathered one chunk ahead, by the same rule.
    """
    points: dict[int, list[StartSync]] = defaultdict(list)
    forwards = [index for index, compute in enumerate(order) if compute.kind is PassKind.FORWARD]
    first_of_chunk = {order[index].chunk: nth for nth, index in reversed(list(enumerate(forwards)))}
    for chunk in range(num_chunks):
        ahead = max(first_of_chunk[chunk - 1] - rank, 0) if chunk > 1 else 0
        points[forwards[ahead]].append(StartSync(False, chunk))
    backwards = [index for index, compute in enumerate(order) if compute.kind is not PassKind.FORWARD]
    last_of_chunk = {order[index].chunk: nth for nth, index in enumerate(backwards)}
    for chunk, nth in sorted(last_of_chunk.items(), key=lambda item: item[1]):
        later = nth + rank + 1
        points[backwards[later] if later < len(backwards) else len(order)].append(StartSync(True, chunk))
    return points


def _merge(
    order: list[Compute], ticks: list[int], exchanges: dict[int, Exchange], syncs: dict[int, list[StartSync]]
) -> list[Action]:
    """Everything one rank does, in order: at each tick its computation, then its exchange."""
    place = {tick: index for index, tick in enumerate(ticks)}
    actions: list[Action] = []
    for tick in sorted(place.keys() | exchanges.keys()):
        if tick in place:
            actions += syncs.get(place[tick], [])
            actions.append(order[place[tick]])
        if tick in exchanges:
            actions.append(exchanges[tick])
    return actions + syncs.get(len(order), [])
