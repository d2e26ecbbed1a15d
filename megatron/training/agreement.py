"""Decisions that ranks make together: whether one of them failed, and which value all use.

A rank that stops alone leaves the others waiting in their next collective. Where a failure is likely (files,
disks), ranks therefore exchange their success before they continue.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron.core.errors import MegatronError
from megatron.core.process_groups import message_device


def world_size() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def any_rank(flag: bool) -> bool:
    """True everywhere when it is true on one rank."""
    return extremes(int(flag))[1] > 0


def any_rank_each(flags: list[bool]) -> list[bool]:
    """:func:`any_rank` of several flags, in one message."""
    if world_size() == 1:
        return flags
    tensor = torch.tensor(flags, dtype=torch.int64, device=message_device())
    torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in tensor.tolist()]


def extremes(value: int) -> tuple[int, int]:
    """Smallest and largest value of all ranks."""
    if world_size() == 1:
        return value, value
    # One message: the largest of -value is the smallest value, negated.
    pair = torch.tensor([-value, value], dtype=torch.int64, device=message_device())
    torch.distributed.all_reduce(pair, op=torch.distributed.ReduceOp.MAX)
    negated, largest = pair.tolist()
    return -negated, largest


@contextmanager
def failing_together() -> Iterator[None]:
    """Context whose error on one rank becomes the error of all of them, at its end.

    The body must not contain collectives that come after something that can fail. Ranks wait for each other
    at the end, so it is a barrier as well.

    Raises:
        MegatronError: of the lowest failing rank, the same kind and text everywhere.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if world_size() == 1:
        if error is not None:
            raise error
        return
    if not any_rank(error is not None):
        return
    own = None if error is None else (type(error), str(error), socket.gethostname())
    reports: list[tuple[type[Exception], str, str] | None] = [None] * world_size()
    torch.distributed.all_gather_object(reports, own)
    rank, (kind, text, host) = next((i, report) for i, report in enumerate(reports) if report is not None)
    if rank == torch.distributed.get_rank() and error is not None:
        raise error
    failed = sum(report is not None for report in reports)
    where = f"rank {rank} on {host}" + (f" and {failed - 1} more" if failed > 1 else "")
    if issubclass(kind, MegatronError):
        raise _remade(kind, text, where)
    raise MegatronError(f"[{where}] {kind.__name__}: {text}")


def _remade(kind: type[MegatronError], text: str, where: str) -> MegatronError:
    """An error of ``kind`` with another rank's text, whatever arguments its constructor takes."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"[{where}] {text}")
    return error
