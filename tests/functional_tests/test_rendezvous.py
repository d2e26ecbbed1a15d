"""Ranks that never start, start twice or differ: one line names them, and all other ranks end."""

import os
import re
import socket
import sys
import time
from pathlib import Path

import pytest
from small_ranks import free_port, join, run_ranks
from torch.distributed import TCPStore

from launcher import tiny_gpt
from megatron.training.ranks.heartbeat import HeartbeatTable

HOST = socket.gethostname()
LIMIT_S = 4.0


def shorten_notice() -> None:
    """Name missing ranks after one second, not after ten."""
    from megatron.training.ranks import watcher

    watcher.NOTICE_S = 1.0


def join_others(rank: int) -> None:
    shorten_notice()
    join(60.0, limit_s=LIMIT_S)


def lines(output: str, word: str) -> list[str]:
    return [line for line in output.splitlines() if word in line]


def test_a_rank_that_is_not_started_is_named_and_ends_the_others(tmp_path: Path):
    statuses, output = run_ranks(join_others, tmp_path, world_size=4, missing=(2,))
    assert statuses == [1, 1, 1], output
    assert lines(output, "[rank 0] waiting for") == [
        "[rank 0] waiting for rank 2 (arrived: 0-1, 3); the run ends after 4 s of waiting "
        "(--rendezvous-timeout)"
    ], output
    assert lines(output, "error: ") == [
        f"[rank 0 on {HOST}] error: after 4 s still waiting for rank 2 (arrived: 0-1, 3). See what those "
        "ranks have printed; --rendezvous-timeout SECONDS sets how long to wait."
    ], output


def test_without_rank_0_one_rank_per_machine_reports(tmp_path: Path):
    statuses, output = run_ranks(join_others, tmp_path, missing=(0,))
    assert statuses == [1, 1], output
    (notice,) = lines(output, "the run ends after")
    (error,) = lines(output, "error: ")
    reason = (
        r"nobody listens \(connection refused\) at 127.0.0.1:\d+ \(MASTER_ADDR:MASTER_PORT\), where rank 0"
    )
    assert re.search(reason, notice) and re.search(reason, error), output
    assert "Start rank 0, and give all ranks the same MASTER_ADDR and MASTER_PORT" in error


def test_without_rank_0_under_torchrun_one_rank_reports(tmp_path: Path):
    """Its agent keeps the store, which still holds what earlier attempts wrote."""
    kept = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    HeartbeatTable(kept, 0, 3).write(joined="an earlier attempt")
    environment = {"MASTER_PORT": str(kept.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    changes = dict.fromkeys((1, 2), environment)
    statuses, output = run_ranks(join_others, tmp_path, missing=(0,), changes=changes)
    assert statuses == [1, 1], output
    (notice,) = lines(output, "the run ends after")
    assert "waiting for rank 0 (arrived: 1-2); " in notice
    (error,) = lines(output, "error: ")
    assert "after 4 s still waiting for rank 0 (arrived: 1-2). " in error


def test_a_rank_with_another_port_is_named(tmp_path: Path):
    statuses, output = run_ranks(join_others, tmp_path, changes={2: {"MASTER_PORT": str(free_port())}})
    assert statuses == [1, 1, 1], output
    first, second = sorted(lines(output, "error: "))
    assert "after 4 s still waiting for rank 2 (arrived: 0-1)" in first, output
    assert second.startswith(f"[rank 2 on {HOST}] error: nobody listens"), output


def sleep_before_joining(rank: int) -> None:
    shorten_notice()
    if rank == 1:
        time.sleep(1000)
    join(60.0, limit_s=LIMIT_S)


def test_a_rank_that_starts_and_never_joins_is_named_with_its_location(tmp_path: Path):
    statuses, output = run_ranks(sleep_before_joining, tmp_path)
    assert statuses == [1, 1, 1], output
    (error,) = lines(output, "error: ")
    assert "still waiting for rank 1 (arrived: 0, 2); rank 1 on " in error, output
    assert "has started and is in test_rendezvous.py:" in error and "(sleep_before_joining)" in error, output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({2: {"WORLD_SIZE": "4"}}, "was started with WORLD_SIZE=4, but rank 0 on"),
        ({2: {"WORLD_SIZE": "2"}}, "was started with WORLD_SIZE=2, but rank 0 on"),
        ({2: {"RANK": "1"}}, "RANK=1 was given to two processes: process"),
    ],
)
def test_differing_world_sizes_and_double_ranks_are_refused(changes: dict, message: str, tmp_path: Path):
    statuses, output = run_ranks(join_others, tmp_path, changes=changes)
    assert statuses == [1, 1, 1], output
    assert output.count("error: ") == output.count(message) == 1, output


@pytest.mark.slow
def test_a_second_rank_0_is_refused(tmp_path: Path):
    statuses, output = run_ranks(join_others, tmp_path, changes={2: {"RANK": "0"}})
    assert statuses == [1, 1, 1], output
    (refused,) = lines(output, "another process of this machine listens at that port")
    assert "MASTER_PORT=" in refused and "unless two processes have RANK=0" in refused


def train(rank: int) -> None:
    import pretrain_gpt

    sys.argv = ["pretrain_gpt.py", *os.environ["WORDS"].split()]
    pretrain_gpt.main()


def test_a_differing_flag_is_named(golden: Path, tmp_path: Path):
    words, others = (
        " ".join(map(str, tiny_gpt(golden, tmp_path, train_iters=steps, lr_warmup_iters=0)))
        for steps in (2, 4)
    )
    changes = {0: {"WORDS": words}, 1: {"WORDS": others}}
    statuses, output = run_ranks(train, tmp_path, world_size=2, changes=changes)
    assert statuses == [1, 1], output
    (error,) = lines(output, "error: ")
    assert re.search(
        rf"rank 1 on {re.escape(HOST)} \(process \d+\): --train-iters is 4 here, but 2 on rank 0", error
    )


def train_with_slow_indexing(rank: int) -> None:
    from megatron.core.datasets.gpt_dataset import GPTDataset
    from megatron.training.ranks import watcher

    check = GPTDataset._check_enough_tokens

    def slow_check(*words: object) -> None:
        time.sleep(6.0 if rank == 0 else 0.0)
        check(*words)

    watcher.LONG_PHASE_S = 1.0
    GPTDataset._check_enough_tokens = slow_check
    train(rank)


def test_ranks_wait_for_a_long_index_build(golden: Path, tmp_path: Path):
    """The build takes longer than the limit of the rendezvous."""
    words = " ".join(
        map(str, tiny_gpt(golden, tmp_path, train_iters=2, lr_warmup_iters=0, rendezvous_timeout=5))
    )
    words = words.replace("--train-iters 2", "--train-iters 2 --split 100,0,0")
    statuses, output = run_ranks(
        train_with_slow_indexing, tmp_path, world_size=2, changes={rank: {"WORDS": words} for rank in (0, 1)}
    )
    assert statuses == [0, 0], output
    assert (
        lines(output, "rank 0 has been building the index of a data set for 1 s") and "error: " not in output
    )
    assert not lines(output, "rank 1 has been")
