"""Records that ranks keep renewing in the store of their rendezvous.

A store can outlive the processes that wrote to it: torchrun keeps one over its restarts. A record therefore
counts only while it changes, and every process signs its own with a word that no other uses.
"""

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field

from torch.distributed import Store

from megatron.training.ranks.places import Place
from megatron.training.ranks.processes import Process

_BLANK = "-"
# Other processes seen writing a record before it is taken for a second one of the same rank.
_FOREIGN_WRITES = 2


@dataclass(frozen=True)
class Beat:
    """What one rank says of itself.

    Attributes:
        nonce: word of the process.
        number: counts the writes.
        process: which process this is.
        world_size: number of ranks, as this one was told.
        joined: nonce of the rank 0 that it waits for the others with; "" before it does.
        place: what it is doing.
        end: "" while it runs, ``well``, or how it left.
        detailed: whether the place was written after a failure became known.
    """

    nonce: str
    number: int
    process: Process
    world_size: int
    joined: str = ""
    place: Place = field(default_factory=lambda: Place("", "", False))
    end: str = ""
    detailed: bool = False

    def encode(self) -> str:
        return json.dumps({**asdict(self), "process": [*self.process], "place": [*self.place]})

    @classmethod
    def decode(cls, text: str) -> "Beat | None":
        """The record in a text; None for another text, such as that of an earlier version."""
        try:
            words = json.loads(text)
            return cls(**{**words, "process": Process(*words["process"]), "place": Place(*words["place"])})
        except (ValueError, TypeError, KeyError):
            return None


class Beats:
    """Access to the records.

    Args:
        store: of the rendezvous.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int):
        self._store, self._rank = store, rank
        self._own = Beat(uuid.uuid4().hex[:12], 0, Process.own(), world_size)
        self._written = ""
        self._foreign = 0
        self._exist: set[int] = set()

    @property
    def own(self) -> Beat:
        """What was written last."""
        return self._own

    def write(self, **changes: object) -> Beat | None:
        """Renew the record of this rank.

        Returns:
            The record of another process that has the same rank, once that is certain.
        """
        self._own = Beat(**{**self._own.__dict__, "number": self._own.number + 1, **changes})
        text = self._own.encode()
        expected = self._written
        for _ in range(3):
            found = self._store.compare_set(_key(self._rank), expected, text).decode()
            if found == text:
                break
            if self._written and found != _BLANK:
                self._foreign += 1
            expected = found
        first, self._written = not self._written, text
        if first or self._foreign < _FOREIGN_WRITES:
            return None
        return Beat.decode(expected)

    def read(self, rank: int) -> Beat | None:
        """The record of one rank, None if it has written none."""
        return self.read_all([rank])[0]

    def read_all(self, ranks: Sequence[int]) -> list[Beat | None]:
        """Records of several ranks in one message; the first question about a rank costs one more."""
        self._create(ranks)
        values = self._store.multi_get([_key(rank) for rank in ranks]) if ranks else []
        return [Beat.decode(value.decode()) for value in values]

    def _create(self, ranks: Iterable[int]) -> None:
        """Reading what nobody has written would wait for it."""
        for rank in set(ranks) - self._exist:
            self._store.compare_set(_key(rank), "", _BLANK)
            self._exist.add(rank)


def _key(rank: int) -> str:
    return f"beat_{rank}"
