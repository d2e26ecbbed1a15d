"""Waiting until all ranks are there, and saying who is not."""

from megatron.training.ranks import sentences
from megatron.training.ranks.arguments import Comparison
from megatron.training.ranks.beats import Beat
from megatron.training.ranks.failure import say
from megatron.training.ranks.session import Session

_NO_RANK_0 = "rank 0 is missing"


class Meeting:
    """One rank's part in the meeting.

    Args:
        session: of this rank.
        arguments: what must be equal on all ranks, by name.
    """

    def __init__(self, session: Session, arguments: dict[str, str]):
        self._session, self._comparison = session, Comparison(arguments)
        self._arrived: dict[int, Beat] = {}

    def go_on(self) -> str:
        """One step; ``session.met`` is then True if all have come.

        Returns:
            Why the ranks cannot run together; "" while nothing speaks against it.
        """
        session = self._session
        if not session.attempt:
            session.beat(joined=_NO_RANK_0)
            return ""
        difference = self._comparison.with_rank_0(session.shared(), session.rank)
        if difference:
            return f"{sentences.one_rank(session.rank, session.own)}: {difference}"
        if difference is None:
            return ""
        if session.own.joined != session.attempt:
            session.beat(joined=session.attempt)
        if session.rank == 0:
            self._count_arrivals()
        elif session.shared().check(["complete"]):
            session.met = True
        return ""

    def _count_arrivals(self) -> None:
        session = self._session
        missing = [rank for rank in range(1, session.world_size) if rank not in self._arrived]
        for rank, beat in zip(missing, session.beats.read_all(missing), strict=True):
            if beat is not None and beat.joined == session.attempt:
                self._arrived[rank] = beat
        if len(self._arrived) == session.world_size - 1:
            session.shared().set("complete", "1")
            session.met = True

    def notice(self, ending: str) -> None:
        """One rank says who is waited for: rank 0, or the first to want to where that is missing."""
        session = self._session
        if session.rank == 0 or (not session.attempt and session.shared().add("notice", 1) == 1):
            say(f"[rank {session.rank}] waiting for {absent(session)}{ending}")


def absent(session: Session) -> str:
    """Who has not come; see ``sentences.absent``."""
    others = [rank for rank in range(session.world_size) if rank != session.rank]
    before = dict(zip(others, session.beats.read_all(others), strict=True))
    session.wait(max(4 * session.interval_s, 1.0))
    present = {session.rank: session.own}
    for rank, beat in zip(others, session.beats.read_all(others), strict=True):
        old = before[rank]
        if beat is not None and old is not None and (beat.nonce, beat.number) != (old.nonce, old.number):
            present[rank] = beat
    arrived = [rank for rank, beat in present.items() if beat.joined]
    return sentences.absent(present, arrived, session.world_size)
