"""Proofs about schedules: complete, in order, free of deadlock, bounded in memory.

Works on the actions of all ranks, whoever made them.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.core.errors import MegatronError
from megatron.core.pipeline_parallel.actions import Action, Compute, Exchange, Message, PassKind

Schedules = Sequence[Sequence[Action]]


class ScheduleError(MegatronError):
    """A list of actions that would hang, compute with data it does not have, or leave passes out."""


@dataclass(frozen=True)
class ScheduleReport:
    """What holds for a schedule that passed.

    Attributes:
        peak_activations: per rank, the most (micro-batch, chunk) pairs whose forward pass was done and
            whose last backward part was not.
        peak_outputs_waiting: per rank, the most of them whose input gradient was not yet done.
        num_messages: transfers between ranks in one step.
    """

    peak_activations: list[int]
    peak_outputs_waiting: list[int]
    num_messages: int


def check_schedules(schedules: Schedules, num_microbatches: int, num_chunks: int = 1) -> ScheduleReport:
    """Proves the schedule of one step.

    Every micro-batch passes every chunk once; each end of a transfer has its partner, and the transfers
    between two ranks happen in one order at both; computations find their inputs; no rank waits for ever,
    whether sending waits for the receiver or not.

    Raises:
        ScheduleError: naming the rank and the action.
    """
    for rank, actions in enumerate(schedules):
        _check_passes(rank, actions, num_microbatches, num_chunks)
        _check_inputs(rank, actions, len(schedules), num_chunks)
    num_messages = _check_channels(schedules)
    simulate(schedules, sending_waits=True)
    simulate(schedules, sending_waits=False)
    return ScheduleReport(
        peak_activations=[_peak(actions, lambda c: c.kind in _LAST_PARTS) for actions in schedules],
        peak_outputs_waiting=[_peak(actions, lambda c: c.kind in _FIRST_PARTS) for actions in schedules],
        num_messages=num_messages,
    )


_FIRST_PARTS = (PassKind.BACKWARD, PassKind.INPUT_GRADIENT)
_LAST_PARTS = (PassKind.BACKWARD, PassKind.WEIGHT_GRADIENT)


def _computes(actions: Sequence[Action]) -> list[Compute]:
    return [action for action in actions if isinstance(action, Compute)]


def _check_passes(rank: int, actions: Sequence[Action], num_microbatches: int, num_chunks: int) -> None:
    """Each micro-batch on each chunk: one forward, then nothing, one backward, or its two halves in order."""
    done: dict[tuple[int, int], str] = defaultdict(str)
    for compute in _computes(actions):
        done[compute.microbatch, compute.chunk] += compute.kind.value
    expected = {(k, chunk) for k in range(num_microbatches) for chunk in range(num_chunks)}
    if done.keys() != expected:
        wrong = min(done.keys() ^ expected)
        raise ScheduleError(f"rank {rank}: micro-batch and chunk {wrong} is missing or not asked for")
    for place, word in done.items():
        if word not in ("F", "FB", "FIW"):
            raise ScheduleError(f"rank {rank}: micro-batch and chunk {place} runs {word}, not F, FB or FIW")
    if len({word == "F" for word in done.values()}) != 1:
        raise ScheduleError(f"rank {rank}: some micro-batches run backward and some do not")


def _check_inputs(rank: int, actions: Sequence[Action], num_stages: int, num_chunks: int) -> None:
    """A computation has received what it needs; what is sent has been computed, and is sent once."""
    received: set[tuple[bool, int, int]] = set()
    to_send: set[tuple[bool, int, int]] = set()
    last_stage = num_stages * num_chunks - 1
    for action in actions:
        if isinstance(action, Compute):
            gradient = action.kind is not PassKind.FORWARD
            stage = action.chunk * num_stages + rank
            key = (gradient, action.microbatch, action.chunk)
            if action.kind is PassKind.WEIGHT_GRADIENT or num_stages == 1:
                continue
            if stage != (last_stage if gradient else 0) and key not in received:
                raise ScheduleError(f"rank {rank}: {action} before its input has arrived")
            received.discard(key)
            if stage != (0 if gradient else last_stage):
                to_send.add(key)
        elif isinstance(action, Exchange):
            for message in action.messages:
                key = (message.gradient, message.microbatch, message.chunk)
                if not message.send:
                    received.add(key)
                elif key in to_send:
                    to_send.discard(key)
                else:
                    raise ScheduleError(f"rank {rank}: {message} before it is computed, or twice")
    if received or to_send:
        raise ScheduleError(f"rank {rank}: never used {sorted(received)}, never sent {sorted(to_send)}")


def _identity(rank: int, message: Message, num_stages: int) -> tuple[bool, int, int]:
    """The same for both ends of a transfer: (gradient, micro-batch, virtual stage of the sender)."""
    stage = message.chunk * num_stages + rank
    if not message.send:
        stage += 1 if message.gradient else -1
    return message.gradient, message.microbatch, stage


def _check_channels(schedules: Schedules) -> int:
    """Both ends of every ordered pair of ranks list the same transfers; returns how many there are."""
    p = len(schedules)
    sent: dict[tuple[int, int], list] = defaultdict(list)
    got: dict[tuple[int, int], list] = defaultdict(list)
    for rank, actions in enumerate(schedules):
        for action in actions:
            for message in action.messages if isinstance(action, Exchange) else ():
                ends = (rank, message.peer) if message.send else (message.peer, rank)
                (sent if message.send else got)[ends].append(_identity(rank, message, p))
    for ends in sent.keys() | got.keys():
        if sent[ends] != got[ends]:
            raise ScheduleError(
                f"from rank {ends[0]} to rank {ends[1]}: sent {sent[ends]} but received {got[ends]}"
            )
    return sum(len(messages) for messages in sent.values())


def simulate(schedules: Schedules, sending_waits: bool) -> None:
    """Runs all ranks' transfers one by one, in order.

    Args:
        schedules: actions of every rank.
        sending_waits: a send ends when its receive has started (a backend without buffers); otherwise at
            once. Receives always wait.

    Raises:
        ScheduleError: ranks wait for each other for ever.
    """
    queues = [
        [message for action in actions if isinstance(action, Exchange) for message in action.messages]
        for actions in schedules
    ]
    position = [0] * len(queues)
    buffered: dict[tuple[int, int], int] = defaultdict(int)

    def advance(rank: int) -> bool:
        if position[rank] == len(queues[rank]):
            return False
        message, peer = queues[rank][position[rank]], queues[rank][position[rank]].peer
        if sending_waits:
            if position[peer] == len(queues[peer]):
                return False
            answer = queues[peer][position[peer]]
            if answer.peer != rank or answer.send == message.send:
                return False
            position[peer] += 1
        elif message.send:
            buffered[rank, peer] += 1
        elif buffered[peer, rank]:
            buffered[peer, rank] -= 1
        else:
            return False
        position[rank] += 1
        return True

    _run_until_stuck(len(queues), advance)
    stuck = {r: queue[position[r]] for r, queue in enumerate(queues) if position[r] < len(queue)}
    if stuck:
        raise ScheduleError(f"deadlock: {'; '.join(f'rank {r} at {m}' for r, m in stuck.items())}")


def _run_until_stuck(num_ranks: int, advance: Callable[[int], bool]) -> None:
    moved = True
    while moved:
        moved = False
        for rank in range(num_ranks):
            while advance(rank):
                moved = True


def _peak(actions: Sequence[Action], frees: Callable[[Compute], bool]) -> int:
    live = peak = 0
    for compute in _computes(actions):
        live += compute.kind is PassKind.FORWARD
        peak = max(peak, live)
        live -= frees(compute)
    return peak
