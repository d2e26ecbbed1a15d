"""How all ranks end after a failure: who speaks, and what the records of all tell."""

import time

from megatron.training.ranks.beats import Beat
from megatron.training.ranks.failure import Failure
from megatron.training.ranks.sentences import Finding, explain
from megatron.training.ranks.session import INTERVAL_S, Session
from megatron.training.ranks.store import WatchedStore

# A failure of all ranks, such as a wrong argument, reaches them within this time.
SETTLE_S = 1.0
# Longest wait for the rank that speaks, which may have died.
SPOKEN_S = 20.0
# How long a rank may take to answer after a failure before it is called silent.
ANSWER_S = 10.0


def failed(session: Session) -> bool:
    """Whether a rank of this attempt wants all to end."""
    return bool(session.attempt) and session.shared().check(["failure"])


def settle(session: Session, failure: Failure | None) -> tuple[int, bool]:
    """Let the ranks agree on one that speaks.

    It is the lowest of those that failed by themselves, or else of those that noticed something.

    Args:
        session: of this rank.
        failure: of this rank.

    Returns:
        Exit status for all, and whether this rank is to speak; it then calls :func:`spoken`.
    """
    shared = session.shared()
    if failure is not None:
        _claim(session, shared, failure)
    session.wait(SETTLE_S, detailed=True)
    _, _, nonce, status = shared.get("failure").decode().split()
    if nonce == session.own.nonce and shared.add("speaking", 1) == 1:
        return int(status), True
    if session.wait(SPOKEN_S, lambda: shared.check(["spoken"]), detailed=True):
        return int(status), False
    return int(status), shared.add("speaking late", 1) == 1


def spoken(session: Session) -> None:
    """The cause is on the screen: everybody may leave."""
    session.shared().set("spoken", "1")


def leave_last(session: Session) -> None:
    """The process that keeps the store gives the others time to read it."""
    if session.address.hosted_here:
        time.sleep(2 * max(session.interval_s, INTERVAL_S) + 0.5)


def _claim(session: Session, shared: WatchedStore, failure: Failure) -> None:
    """Make this rank the one that speaks, unless another knows better or is lower."""
    mine = f"{failure.kind} {session.rank} {session.own.nonce} {failure.status}"
    known = ""
    while True:
        found = shared.compare_set("failure", known, mine).decode()
        if found == mine or (found and _precedence(found) <= _precedence(mine)):
            return
        known = found


def _precedence(claim: str) -> tuple[int, int]:
    consequence, rank = claim.split()[:2]
    return int(consequence), int(rank)


def explanation(session: Session, error: str) -> str:
    """What the records of all ranks tell about a failure that none of them knows the cause of."""
    return explain(_question_all(session), error or "no message came within the time limit")


def _question_all(session: Session) -> dict[int, Finding]:
    """What every rank is doing: those that live write it when they see that there is a failure."""
    ranks = range(session.world_size)
    before = session.beats.read_all(ranks)
    found: dict[int, Finding] = {}
    deadline = time.monotonic() + max(ANSWER_S, 4 * session.interval_s)
    while True:
        session.beat(detailed=True)
        last = time.monotonic() > deadline
        for rank, old, beat in zip(ranks, before, session.beats.read_all(ranks), strict=True):
            finding = _judge(session, rank, old, beat, last)
            if finding is not None:
                found.setdefault(rank, finding)
        if len(found) == session.world_size or last:
            return dict(sorted(found.items()))
        time.sleep(0.2)


def _judge(session: Session, rank: int, old: Beat | None, beat: Beat | None, last: bool) -> Finding | None:
    """What a rank's record says; None while it has not answered and still may."""
    renewed = beat is not None and old is not None and (beat.nonce, beat.number) != (old.nonce, old.number)
    if beat is None or (session.attempt and session.attempt not in (beat.joined, beat.nonce)):
        if renewed:  # it is on its way to the others
            return Finding("busy", beat)
        return Finding("absent", None) if last else None
    if beat.end:
        return Finding("left", beat)
    condition = beat.process.condition()
    if condition == "ended":
        return Finding("ended", beat)
    if beat.detailed and (renewed or rank == session.rank):
        return Finding("waits" if beat.place.waits else "busy", beat)
    if not last:
        return None
    return Finding({"stopped": "stopped", "runs": "held"}.get(condition, "silent"), beat)
