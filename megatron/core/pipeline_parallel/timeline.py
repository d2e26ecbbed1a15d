"""When each computation of a schedule runs, given durations, and how much of the time ranks stand idle.

Transfers take no time. The bubble fraction is that of Narayanan et al. 2021 (section 2.2): the time a rank
stands idle in one step, divided by the time it computes, which is what the step would take with no idle
time:

    1F1B          (p - 1) / m
    interleaved   (p - 1) / (v m)
    ZB-H1         (p - 1) (T_F + T_I - T_W) / (m (T_F + T_I + T_W))   Qi et al. 2023, table 1 (T_B: T_I)

The last is (p - 1) / (3 m), a third of 1F1B's, when forward, input-gradient and weight-gradient passes
take the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.actions import Action, Compute, Exchange, PassKind


@dataclass(frozen=True)
class Durations:
    """Times of one micro-batch on one whole pipeline stage (all chunks of a rank), in any unit."""

    forward: float = 1.0
    input_gradient: float = 1.0
    weight_gradient: float = 1.0

    def of(self, kind: PassKind, num_chunks: int) -> float:
        """Time of one computation on one of ``num_chunks`` chunks."""
        whole = {
            PassKind.FORWARD: self.forward,
            PassKind.BACKWARD: self.input_gradient + self.weight_gradient,
            PassKind.INPUT_GRADIENT: self.input_gradient,
            PassKind.WEIGHT_GRADIENT: self.weight_gradient,
        }
        return whole[kind] / num_chunks


@dataclass(frozen=True)
class Span:
    """One computation on the time axis."""

    compute: Compute
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All computations of one step.

    Attributes:
        ranks: spans of each rank, in order.
    """

    ranks: list[list[Span]]

    @property
    def makespan(self) -> float:
        """Time of the step."""
        return max(spans[-1].end for spans in self.ranks)

    def busy(self, rank: int = 0) -> float:
        """Time rank ``rank`` computes."""
        return sum(span.end - span.start for span in self.ranks[rank])

    @property
    def bubble_fraction(self) -> float:
        """Idle time of a rank over its computing time (see the top of this module)."""
        return self.makespan / self.busy() - 1.0

    @property
    def idle_share(self) -> float:
        """Idle time of a rank over the time of the step, for those who mean that by bubble."""
        return 1.0 - self.busy() / self.makespan


def make_timeline(
    schedules: Sequence[Sequence[Action]],
    num_chunks: int = 1,
    durations: Durations | None = None,
) -> Timeline:
    """Plays a schedule.

    Args:
        schedules: actions of every rank, as :func:`make_schedules` gives them.
        num_chunks: chunks per rank.
        durations: default: forward, input gradient and weight gradient take one unit each.

    Raises:
        ConfigError: the schedule deadlocks.
    """
    player = _Player(schedules, num_chunks, durations or Durations())
    while any(player.advance(rank) for rank in range(len(schedules))):
        pass
    player.check_finished()
    return Timeline(player.spans)


class _Player:
    """Clocks of all ranks, each as far as what it needs from the others allows."""

    def __init__(self, schedules: Sequence[Sequence[Action]], num_chunks: int, durations: Durations):
        self.schedules, self.num_chunks, self.durations = schedules, num_chunks, durations
        self.position = [0] * len(schedules)
        self.clock = [0.0] * len(schedules)
        self.spans: list[list[Span]] = [[] for _ in schedules]
        # (sending virtual stage, gradient?, micro-batch) -> when it was sent
        self.sent: dict[tuple[int, bool, int], float] = {}

    def advance(self, rank: int) -> bool:
        """As many actions of one rank as possible; whether there was any."""
        before = self.position[rank]
        actions = self.schedules[rank]
        while self.position[rank] < len(actions) and self._play(rank, actions[self.position[rank]]):
            self.position[rank] += 1
        return self.position[rank] > before

    def check_finished(self) -> None:
        stuck = [r for r, actions in enumerate(self.schedules) if self.position[r] < len(actions)]
        if stuck:
            raise ConfigError(f"this schedule deadlocks: ranks {stuck} wait for ever")

    def _play(self, rank: int, action: Action) -> bool:
        if isinstance(action, Compute):
            return self._compute(rank, action)
        for message in action.messages if isinstance(action, Exchange) else ():
            if message.send:
                stage = message.chunk * len(self.schedules) + rank
                self.sent[stage, message.gradient, message.microbatch] = self.clock[rank]
        return True

    def _compute(self, rank: int, compute: Compute) -> bool:
        start = self.clock[rank]
        source = compute.chunk * len(self.schedules) + rank + (-1 if compute.kind is PassKind.FORWARD else 1)
        from_a_stage = 0 <= source < len(self.schedules) * self.num_chunks and len(self.schedules) > 1
        if from_a_stage and compute.kind is not PassKind.WEIGHT_GRADIENT:
            key = (source, compute.kind is not PassKind.FORWARD, compute.microbatch)
            if key not in self.sent:
                return False
            start = max(start, self.sent[key])
        end = start + self.durations.of(compute.kind, self.num_chunks)
        self.spans[rank].append(Span(compute, start, end))
        self.clock[rank] = end
        return True
