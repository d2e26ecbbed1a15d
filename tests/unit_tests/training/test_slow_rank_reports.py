"""``--log-straggler`` in the real loop on two ranks."""

import contextlib
import io
import sys
import time
import urllib.request
from pathlib import Path

from tests.distributed.gpt_run import NO_DROPOUT, command_line
from tests.distributed.layouts import Layout
from tests.distributed.pool import run_ranks

SLEEP_S = 0.2


def train(argv: list[str], turned_at: int | None) -> str:
    """Output of this rank, whose second one loads slowly; rank 0 turns the switch in one iteration."""
    import pretrain_gpt
    from megatron.core.utils import StragglerDetector
    from megatron.training import get_args

    output, forward_step, get_batch = io.StringIO(), pretrain_gpt.forward_step, pretrain_gpt.get_batch
    turned = []

    def step(*args):
        if get_args().curr_iteration == turned_at and get_args().rank == 0 and not turned:
            turned.append(1)
            urllib.request.urlopen(f"http://127.0.0.1:{StragglerDetector().port}/", timeout=10).close()
        return forward_step(*args)

    def slow_batch(*args):
        time.sleep(SLEEP_S if get_args().rank == 1 else 0)
        return get_batch(*args)

    sys.argv = ["pretrain_gpt.py", *argv]
    with contextlib.redirect_stdout(output):
        pretrain_gpt.forward_step, pretrain_gpt.get_batch = step, slow_batch
        try:
            pretrain_gpt.main()
        finally:
            pretrain_gpt.forward_step, pretrain_gpt.get_batch = forward_step, get_batch
    assert StragglerDetector().port is None
    return output.getvalue()


def reports(output: str) -> list[str]:
    return [line for line in output.splitlines() if "slowest rank" in line]


def run(tmp_path: Path, flags: str, turned_at: int | None = None) -> list[str]:
    argv = command_line(Layout(dp=2), tmp_path / "cache", f"{NO_DROPOUT} {flags}")
    return run_ranks(2, train, argv, turned_at)


def test_ranks_are_compared_at_every_log_line(tmp_path: Path):
    first, second = run(tmp_path, "--log-straggler --straggler-minmax-count 2 --straggler-ctrlr-port 0")
    assert len(reports(first)) == 4 and not reports(second)
    for line in reports(first):
        slowest, fastest = line.split(" | ")[1:3]
        loading_ms = {
            part.split(":")[0]: float(part.split("data ")[1].rstrip(")")) for part in slowest[8:].split(", ")
        }
        assert loading_ms["rank 1"] >= 1e3 * SLEEP_S
        assert set(loading_ms) == {"rank 0", "rank 1"}
        assert fastest.count("rank") == 2


def test_a_request_switches_reports_on_in_a_run(tmp_path: Path):
    first, _ = run(
        tmp_path, "--log-straggler --disable-straggler-on-startup --straggler-ctrlr-port 0", turned_at=1
    )
    # Asked for during the second step, on from the third.
    assert first.count("the straggler detector is on") == 1
    assert len(reports(first)) == 2
    silent, _ = run(tmp_path, "")
    assert "straggler" not in silent
