"""The report of a failure: which rank makes it, what every rank was doing, and the sentence about it."""

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron.training.ranks.failure import Failure
from megatron.training.ranks.heartbeat import INTERVAL_S, Heartbeat, Session
from megatron.training.ranks.store import WatchedStore

# A failure that all ranks share, such as a wrong argument, reaches all of them within this time.
CLAIM_S = 1.0
# Longest wait for the rank that reports, which may have died.
REPORT_S = 20.0
# How long a rank may take to answer after a failure before it is called silent.
ANSWER_S = 10.0
_PLURAL = {"waits": "wait", "is": "are"}


@dataclass(frozen=True)
class Finding:
    """What is known of a rank after a failure.

    Attributes:
        kind: ``waits`` (inside a collective or transfer), ``busy`` (outside one), ``stopped``, ``held`` (its
            process runs, its threads do not), ``silent`` (its heartbeat stays the same, on another machine),
            ``ended`` (for an unknown reason), ``left`` (by itself), ``absent`` (has not joined yet).
        heartbeat: its last one.
    """

    kind: str
    heartbeat: Heartbeat | None


def failed(session: Session) -> bool:
    """Whether a rank of this attempt wants all to end."""
    return bool(session.attempt) and session.shared().check(["failure"])


def choose_reporter(session: Session, failure: Failure | None) -> tuple[int, bool]:
    """Let the ranks agree on the one that reports.

    It is the lowest of those that failed by themselves, or else of those that noticed a failure.

    Args:
        session: of this rank.
        failure: of this rank.

    Returns:
        Exit status for all, and whether this rank is to report; it then calls :func:`mark_reported`.
    """
    shared = session.shared()
    if failure is not None:
        _claim(session, shared, failure)
    session.wait(CLAIM_S, detailed=True)
    _, _, nonce, status = shared.get("failure").decode().split()
    if nonce == session.own.nonce and shared.add("reporting", 1) == 1:
        return int(status), True
    if session.wait(REPORT_S, lambda: shared.check(["reported"]), detailed=True):
        return int(status), False
    return int(status), shared.add("reporting late", 1) == 1


def mark_reported(session: Session) -> None:
    """Let all ranks leave: the cause is on the screen."""
    session.shared().set("reported", "1")


def leave(session: Session) -> None:
    """End the part of this rank in a report; a rank whose end takes the store away waits for the others.

    A rank that lost the store before it could read that the cause is reported would report it again.
    """
    with contextlib.suppress(RuntimeError):  # the store is gone, so no rank needs to wait for it
        shared = session.shared()
        left = shared.add("left", 1)
        if session.address.ends_with_this_rank and left < session.world_size:
            limit_s = CLAIM_S + 2 * max(session.interval_s, INTERVAL_S) + 0.5
            session.wait(limit_s, lambda: shared.add("left", 0) >= session.world_size)


def _claim(session: Session, shared: WatchedStore, failure: Failure) -> None:
    """Make this rank the reporter, unless a failure of a lower kind, or of a lower rank, is known."""
    mine = f"{failure.kind} {session.rank} {session.own.nonce} {failure.status}"
    known = ""
    while True:
        found = shared.compare_set("failure", known, mine).decode()
        if found == mine or (found and _precedence(found) <= _precedence(mine)):
            return
        known = found


def _precedence(claim: str) -> tuple[int, int]:
    kind, rank = claim.split()[:2]
    return int(kind), int(rank)


def explanation(session: Session, error: str) -> str:
    """What the heartbeats of all ranks show about a failure whose cause no rank knows."""
    return explain(_find_all(session), error or "no message came within the time limit")


def _find_all(session: Session) -> dict[int, Finding]:
    """Finding of every rank; those that live write their location when they see that there is a failure."""
    ranks = range(session.world_size)
    before = session.heartbeats.read_all(ranks)
    found: dict[int, Finding] = {}
    deadline = time.monotonic() + max(ANSWER_S, 4 * session.interval_s)
    while True:
        session.renew(detailed=True)
        last = time.monotonic() > deadline
        for rank, old, heartbeat in zip(ranks, before, session.heartbeats.read_all(ranks), strict=True):
            finding = _judge(session, rank, old, heartbeat, last)
            if finding is not None:
                found.setdefault(rank, finding)
        if len(found) == session.world_size or last:
            return dict(sorted(found.items()))
        time.sleep(0.2)


def _judge(
    session: Session, rank: int, old: Heartbeat | None, heartbeat: Heartbeat | None, last: bool
) -> Finding | None:
    """Finding from one heartbeat; None while the rank has not answered and still may."""
    renewed = (
        heartbeat is not None
        and old is not None
        and (heartbeat.nonce, heartbeat.number) != (old.nonce, old.number)
    )
    if heartbeat is None or (session.attempt and session.attempt not in (heartbeat.joined, heartbeat.nonce)):
        if renewed:  # it has started and not joined yet
            return Finding("busy", heartbeat)
        return Finding("absent", None) if last else None
    if heartbeat.end:
        return Finding("left", heartbeat)
    condition = heartbeat.process.condition()
    if condition == "ended":
        return Finding("ended", heartbeat)
    if heartbeat.detailed and (renewed or rank == session.rank):
        return Finding("waits" if heartbeat.location.waits else "busy", heartbeat)
    if not last:
        return None
    return Finding({"stopped": "stopped", "runs": "held"}.get(condition, "silent"), heartbeat)


def rank_list(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-2, 4``."""
    ordered = sorted(ranks)
    return f"{'rank' if len(ordered) == 1 else 'ranks'} {rank_numbers(ordered)}"


def rank_numbers(ranks: Iterable[int]) -> str:
    """``0-2, 4``; ``none`` for no ranks."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"


def describe_rank(rank: int, heartbeat: Heartbeat | None) -> str:
    """``rank 3 on host b (process 17)``."""
    if heartbeat is None:
        return f"rank {rank}"
    return f"rank {rank} on {heartbeat.process.host} (process {heartbeat.process.pid})"


def explain(findings: Mapping[int, Finding], error: str) -> str:
    """The sentence that names the ranks that others wait for, and what each was doing.

    Args:
        findings: by rank.
        error: message of torch, in one line.
    """
    by_kind: dict[str, list[int]] = {}
    for rank, finding in findings.items():
        by_kind.setdefault(finding.kind, []).append(rank)
    missing = next(
        (by_kind[kind] for kind in ("ended", "stopped", "held", "silent", "left", "busy") if kind in by_kind),
        [],
    )
    if not missing or len(missing) == len(findings):
        return _mismatch(findings, error)
    text = "; ".join(_describe_finding(rank, findings[rank]) for rank in missing[:4])
    if len(missing) > 4:
        text += f"; and {rank_list(missing[4:])} alike"
    others = {rank: finding for rank, finding in findings.items() if rank not in missing}
    return f"{text}. Meanwhile {_groups(others)}"


def _describe_finding(rank: int, finding: Finding) -> str:
    who, heartbeat = describe_rank(rank, finding.heartbeat), finding.heartbeat
    last = f"; last seen in {heartbeat.location}" if heartbeat else ""
    if finding.kind == "ended":
        return (
            f"{who} has ended without a word{last} (killed by a signal, perhaps for lack of memory, or "
            "ended by a library: see its own output and dmesg)"
        )
    if finding.kind == "stopped":
        return f"{who} is stopped by a signal (SIGSTOP){last}"
    if finding.kind == "held":
        return f"{who} does not respond: its process runs, but its code holds the interpreter{last}"
    if finding.kind == "silent":
        return f"{who} does not respond: it is gone, its host is, or its code holds the interpreter{last}"
    if finding.kind == "left":
        how = (
            "ended its run"
            if heartbeat and heartbeat.end == "well"
            else f"left with {heartbeat.end if heartbeat else 'an error'}"
        )
        return f"{who} has {how} while others go on{last}"
    return f"{who} has not come to the others: it is in {heartbeat.location if heartbeat else 'its own code'}"


def _mismatch(findings: Mapping[int, Finding], error: str) -> str:
    return (
        f"ranks wait for each other in different calls, or with different sizes: {_groups(findings)}. "
        f"({error})"
    )


def _groups(findings: Mapping[int, Finding]) -> str:
    """What all ranks are doing, those at the same location together."""
    locations: dict[str, list[int]] = {}
    for rank, finding in findings.items():
        if finding.heartbeat is None:
            location = "is not there"
        else:
            location = f"{'waits' if finding.kind == 'waits' else 'is'} in {finding.heartbeat.location}"
        locations.setdefault(location, []).append(rank)
    texts = []
    for location, ranks in sorted(locations.items(), key=lambda item: min(item[1])):
        verb, _, rest = location.partition(" ")
        plural = f"{_PLURAL[verb]} {rest}" if len(ranks) > 1 else location
        texts.append(f"{rank_list(ranks)} {plural}")
    shown = texts[:6]
    return "; ".join(shown) + (f"; and {len(texts) - 6} more places" if len(texts) > 6 else "")


def missing_ranks(present: Mapping[int, Heartbeat], arrived: Iterable[int], world_size: int) -> str:
    """``ranks 3, 5 (arrived: 0-2, 4)``, and what is known of those that have started.

    Args:
        present: heartbeats of ranks whose process runs.
        arrived: ranks that have joined the rendezvous.
        world_size: number of ranks.
    """
    here = set(arrived)
    missing = [rank for rank in range(world_size) if rank not in here]
    started = [rank for rank in missing if rank in present]
    text = f"{rank_list(missing)} (arrived: {rank_numbers(here)})"
    for rank in started[:3]:
        text += f"; {describe_rank(rank, present[rank])} has started and is in {present[rank].location}"
    return text
