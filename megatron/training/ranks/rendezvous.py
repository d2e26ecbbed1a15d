"""Rendezvous: waiting until all ranks have joined with equal arguments, and naming those that have not."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Protocol, cast

from megatron.training.ranks import report
from megatron.training.ranks.failure import print_line
from megatron.training.ranks.heartbeat import Heartbeat, Session

_NO_RANK_0 = "rank 0 is missing"
# Arguments that may differ: they belong to one rank or host, such as paths and what is shown there.
_OWN = {
    "rank",
    "local_rank",
    "given_flags",
    "num_workers",
    "pretrained_checkpoint",
    "yaml_cfg",
    "data_path",
    "tokenizer_model",
}
# Paths that may differ between hosts, but must be given on all ranks or on none.
_GIVEN_OR_NOT = ("load", "save")
_OWN_ENDINGS = ("_path", "_paths", "_dir", "_file", "_directory", "_filename")
_OWN_BEGINNINGS = (
    "tensorboard",
    "wandb",
    "logging_level",
    "profile",
    "vocab_file",
    "merge_file",
    "straggler",
)
_SHOWN = 5


class Rendezvous:
    """One rank's part in the rendezvous.

    Args:
        session: of this rank.
        arguments: what must be equal on all ranks, by name.
    """

    def __init__(self, session: Session, arguments: dict[str, str]):
        self._session, self._comparison = session, ArgumentComparison(arguments)
        self._joined: dict[int, Heartbeat] = {}

    def advance(self) -> str:
        """Do what can be done without waiting; sets ``session.all_joined`` once all ranks have joined.

        Returns:
            Why the ranks cannot run together; "" where no reason is known.
        """
        session = self._session
        if not session.attempt:
            session.renew(joined=_NO_RANK_0)
            return ""
        difference = self._comparison.with_rank_0(cast(Shared, session.shared()), session.rank)
        if difference:
            return f"{report.describe_rank(session.rank, session.own)}: {difference}"
        if difference is None:
            return ""
        if session.own.joined != session.attempt:
            session.renew(joined=session.attempt)
        if session.rank == 0:
            self._count_joined()
        elif session.shared().check(["complete"]):
            session.all_joined = True
        return ""

    def _count_joined(self) -> None:
        session = self._session
        missing = [rank for rank in range(1, session.world_size) if rank not in self._joined]
        for rank, heartbeat in zip(missing, session.heartbeats.read_all(missing), strict=True):
            if heartbeat is not None and heartbeat.joined == session.attempt:
                self._joined[rank] = heartbeat
        if len(self._joined) == session.world_size - 1:
            session.shared().set("complete", "1")
            session.all_joined = True

    def notice(self, ending: str) -> None:
        """Print on one rank which ranks are missing: on rank 0, or, without it, on the first rank to ask."""
        session = self._session
        if session.rank == 0 or (not session.attempt and session.shared().add("notice", 1) == 1):
            print_line(f"[rank {session.rank}] waiting for {missing_ranks(session)}{ending}")


def missing_ranks(session: Session) -> str:
    """Names the ranks that have not joined; see ``report.missing_ranks``."""
    others = [rank for rank in range(session.world_size) if rank != session.rank]
    before = dict(zip(others, session.heartbeats.read_all(others), strict=True))
    session.wait(max(4 * session.interval_s, 1.0))
    present = {session.rank: session.own}
    for rank, heartbeat in zip(others, session.heartbeats.read_all(others), strict=True):
        old = before[rank]
        if (
            heartbeat is not None
            and old is not None
            and (heartbeat.nonce, heartbeat.number) != (old.nonce, old.number)
        ):
            present[rank] = heartbeat
    arrived = [rank for rank, heartbeat in present.items() if heartbeat.joined]
    return report.missing_ranks(present, arrived, session.world_size)


class Shared(Protocol):
    """The part of a store that is needed here."""

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def set(self, key: str, value: str) -> None: ...


def comparable(args: Namespace) -> dict[str, str]:
    """Arguments that all ranks must agree on, as text."""
    given = {
        name: "not given" if value is None else "given"
        for name, value in vars(args).items()
        if name in _GIVEN_OR_NOT
    }
    return given | {
        name: repr(value)
        for name, value in sorted(vars(args).items())
        if name not in _OWN
        and name not in _GIVEN_OR_NOT
        and not name.endswith(_OWN_ENDINGS)
        and not name.startswith(_OWN_BEGINNINGS)
        and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    """Whether equal values have equal texts in every process."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


class ArgumentComparison:
    """Compares this rank's arguments with those of rank 0, once.

    Args:
        arguments: text by name.
    """

    def __init__(self, arguments: Mapping[str, str]):
        self._arguments = dict(arguments)
        self._result: str | None = None

    def with_rank_0(self, shared: Shared, rank: int) -> str | None:
        """What differs, in words; "" where nothing does, None while rank 0 has not come."""
        if self._result is not None:
            return self._result
        text = json.dumps(self._arguments, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if rank == 0:
            shared.set("arguments", text)
            shared.set("digest", digest)
            self._result = ""
        elif shared.check(["digest"]):
            equal = shared.get("digest").decode() == digest
            self._result = "" if equal else self._differences(json.loads(shared.get("arguments")))
        return self._result

    def _differences(self, others: Mapping[str, str]) -> str:
        names = [n for n in {**others, **self._arguments} if others.get(n) != self._arguments.get(n)]
        pairs = [(name, self._arguments.get(name), others.get(name)) for name in names[:_SHOWN]]
        differences = [f"{_flag(name)} is {here} here, but {there} on rank 0" for name, here, there in pairs]
        more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"{'; '.join(differences)}{more}. Start all ranks with the same arguments"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
