"""Arguments that must be equal on all ranks, compared when they meet."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Protocol

# Of a rank, or of its host: where things lie, and what is shown there.
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
# Hosts may have them elsewhere, but all ranks do what they are for together.
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


class Comparison:
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
        told = [f"{_flag(name)} is {here} here, but {there} on rank 0" for name, here, there in pairs]
        more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return f"{'; '.join(told)}{more}. Start all ranks with the same arguments"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
