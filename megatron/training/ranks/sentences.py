"""What is said about ranks that are missing, have ended, or wait for each other."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron.training.ranks.beats import Beat

_PLURAL = {"waits": "wait", "is": "are"}


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-2, 4``."""
    ordered = sorted(ranks)
    return f"{'rank' if len(ordered) == 1 else 'ranks'} {numbers_text(ordered)}"


def numbers_text(ranks: Iterable[int]) -> str:
    """``0-2, 4``; ``none`` for no ranks."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"


def one_rank(rank: int, beat: Beat | None) -> str:
    """``rank 3 on host b (process 17)``."""
    if beat is None:
        return f"rank {rank}"
    return f"rank {rank} on {beat.process.host} (process {beat.process.pid})"


@dataclass(frozen=True)
class Finding:
    """What is known of a rank after a failure.

    Attributes:
        kind: ``waits`` (inside a message), ``busy`` (outside one), ``stopped``, ``held`` (its process
            runs, its threads do not), ``silent`` (gives no sign, on another machine), ``ended`` (nobody
            knows why), ``left`` (by itself), ``absent`` (has not come yet).
        beat: its last record.
    """

    kind: str
    beat: Beat | None


def explain(findings: Mapping[int, Finding], error: str) -> str:
    """The sentence that names who is missing at what.

    Args:
        findings: by rank.
        error: what torch said, in one line.
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
    told = "; ".join(_told(rank, findings[rank]) for rank in missing[:4])
    if len(missing) > 4:
        told += f"; and {ranks_text(missing[4:])} alike"
    others = {rank: finding for rank, finding in findings.items() if rank not in missing}
    return f"{told}. Meanwhile {_groups(others)}"


def _told(rank: int, finding: Finding) -> str:
    who, beat = one_rank(rank, finding.beat), finding.beat
    last = f"; last seen in {beat.place}" if beat else ""
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
            if beat and beat.end == "well"
            else f"left with {beat.end if beat else 'an error'}"
        )
        return f"{who} has {how} while others go on{last}"
    return f"{who} has not come to the others: it is in {beat.place if beat else 'its own code'}"


def _mismatch(findings: Mapping[int, Finding], error: str) -> str:
    return (
        f"ranks wait for each other in different calls, or with different sizes: {_groups(findings)}. "
        f"({error})"
    )


def _groups(findings: Mapping[int, Finding]) -> str:
    """Ranks at the same place, together."""
    places: dict[str, list[int]] = {}
    for rank, finding in findings.items():
        if finding.beat is None:
            place = "is not there"
        else:
            place = f"{'waits' if finding.kind == 'waits' else 'is'} in {finding.beat.place}"
        places.setdefault(place, []).append(rank)
    texts = []
    for place, ranks in sorted(places.items(), key=lambda item: min(item[1])):
        verb, _, rest = place.partition(" ")
        plural = f"{_PLURAL[verb]} {rest}" if len(ranks) > 1 else place
        texts.append(f"{ranks_text(ranks)} {plural}")
    shown = texts[:6]
    return "; ".join(shown) + (f"; and {len(texts) - 6} more places" if len(texts) > 6 else "")


def absent(present: Mapping[int, Beat], arrived: Iterable[int], world_size: int) -> str:
    """``waiting for ranks 3, 5 (arrived: 0-2, 4)``, and what is known of those who have started.

    Args:
        present: records of ranks whose process is there.
        arrived: ranks that wait for the others.
    """
    here = set(arrived)
    missing = [rank for rank in range(world_size) if rank not in here]
    started = [rank for rank in missing if rank in present]
    text = f"{ranks_text(missing)} (arrived: {numbers_text(here)})"
    for rank in started[:3]:
        text += f"; {one_rank(rank, present[rank])} has started and is in {present[rank].place}"
    return text
