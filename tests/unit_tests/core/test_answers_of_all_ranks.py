"""What all ranks say reaches the host at once: a tensor that is asked for its value waits for the device."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.core import timers
from megatron.training import agreement, dist_signal_handler
from tests.distributed.pool import run_ranks

_READS = ("item", "tolist", "__int__", "__float__", "__bool__", "cpu")


def read_answers(name: str) -> tuple[Any, int]:
    """Result of one question to all ranks, and how often a tensor was asked for its value."""
    rank, reads = dist.get_rank(), []
    ask = {
        "signals": lambda: dist_signal_handler.all_gather_item(rank, dtype=torch.int32),
        "timers": lambda: timers._gather([float(rank), 5.0]),
        "extremes": lambda: agreement.extremes(10 + rank),
    }[name]

    def counting(method: Any) -> Any:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            reads.append(method)
            return method(self, *args, **kwargs)

        return read

    replaced = {method: counting(getattr(torch.Tensor, method)) for method in _READS}
    with mock.patch.multiple(torch.Tensor, **replaced):
        answer = ask()
    return answer, len(reads)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("signals", [0, 1, 2]), ("timers", [[0.0, 5.0], [1.0, 5.0], [2.0, 5.0]]), ("extremes", (10, 12))],
)
def test_the_device_is_waited_for_once(name: str, expected: Any) -> None:
    assert run_ranks(3, read_answers, name) == [(expected, 1)] * 3
