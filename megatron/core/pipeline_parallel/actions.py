"""What a pipeline rank can be told to do: the vocabulary of schedules.

A schedule is a list of these per rank. Chunks are numbered within the rank; chunk ``c`` of rank ``r`` is
virtual stage ``c * p + r``, which orders the parts of the model as data flows through them.
"""

from dataclasses import dataclass
from enum import Enum, Flag, auto


class PassKind(Enum):
    """Kinds of passes of one micro-batch through one chunk."""

    FORWARD = "F"
    BACKWARD = "B"
    # The two halves of a backward pass that is split: what the previous stage waits for, and the rest.
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


@dataclass(frozen=True, slots=True)
class Compute:
    """Run a pass of one micro-batch on one chunk."""

    kind: PassKind
    microbatch: int
    chunk: int


class Direction(Flag):
    """What a transfer carries, and which way, seen from one of its two ends."""

    ACTIVATION_OUT = auto()
    ACTIVATION_IN = auto()
    GRADIENT_OUT = auto()
    GRADIENT_IN = auto()


@dataclass(frozen=True, slots=True)
class Message:
    """One transfer, seen from one of its two ends.

    Attributes:
        send: this end sends; otherwise it receives.
        gradient: a gradient on its way to the previous virtual stage; otherwise an activation on its way
            to the next.
        microbatch: whose.
        chunk: of this end: the chunk that made what is sent, or that waits for what is received.
        peer: pipeline rank of the other end.
    """

    send: bool
    gradient: bool
    microbatch: int
    chunk: int
    peer: int

    @property
    def direction(self) -> Direction:
        """Activation or gradient, out or in."""
        if self.gradient:
            return Direction.GRADIENT_OUT if self.send else Direction.GRADIENT_IN
        return Direction.ACTIVATION_OUT if self.send else Direction.ACTIVATION_IN


@dataclass(frozen=True, slots=True)
class Exchange:
    """Transfers that are started together, in this order where they cannot be started at once."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class StartSync:
    """Start the data-parallel collective of a chunk: reduce its gradients, or gather its parameters."""

    gradients: bool
    chunk: int


Action = Compute | Exchange | StartSync
