"""A rank that ends, stops or stays away is named with what it was at, once, and all others end."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_ranks import LIMIT_S, free_port, join, run_ranks

from launcher import tiny_gpt

HOST = socket.gethostname()
TIMEOUT_S = 3.0
# Rank 1 is the one that something happens to.
_NAMED = re.compile(rf"^error: rank 1 on {re.escape(HOST)} \(process \d+\) ", re.MULTILINE)


def add(sizes: int = 4) -> None:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(sizes))


def die(rank: int) -> None:
    join(60.0)
    add()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    add()


def leave_without_a_word(rank: int) -> None:
    join(60.0)
    if rank == 1:
        os._exit(0)
    add()


def crash(rank: int) -> None:
    join(60.0)
    if rank == 1:
        ctypes.string_at(0)
    add()


def die_while_others_compute(rank: int) -> None:
    """Nobody waits for rank 1 in a message."""
    join(60.0)
    add()
    if rank == 1:
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1000)


def die_before_a_group_is_made(rank: int) -> None:
    import torch.distributed as dist

    join(60.0)
    if rank == 1:
        os._exit(7)
    time.sleep(0.2)
    dist.new_group([0, 1, 2])


def die_before_the_others_come(rank: int) -> None:
    if rank == 1:
        from megatron.training.global_vars import get_failure_watcher

        get_failure_watcher()._store_thread.begin_rendezvous({})
        time.sleep(5.0)  # rank 2 has been started and has found the others by then
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        time.sleep(1000)
    join(60.0)


def exit_with_a_status(rank: int) -> None:
    join(60.0)
    if rank == 1:
        raise SystemExit(3)
    time.sleep(1000)


def stay_away(rank: int) -> None:
    join(TIMEOUT_S)
    if rank == 1:
        time.sleep(1000)
    add()


def hold_the_interpreter(rank: int) -> None:
    join(TIMEOUT_S)
    add()
    if rank == 1:
        time.sleep(1.2)
        sum(range(10**13))
    add()


def stop(rank: int) -> None:
    join(TIMEOUT_S)
    add()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    add()


def end_early(rank: int) -> None:
    join(TIMEOUT_S)
    add()
    if rank == 1:
        return
    time.sleep(2.0)
    add()


# One of them may have noticed its lost connection, and be on its way out, when the line is printed.
_WAITING = r"ranks 0, 2 wait in|rank [02] waits in all_reduce|\(_fail\)"
GONE = [
    (die, "has ended without a word", "ranks 0, 2 wait in"),
    pytest.param(
        leave_without_a_word, "has ended without a word", "ranks 0, 2 wait in", marks=pytest.mark.slow
    ),
    (crash, "has ended without a word", "ranks 0, 2 wait in"),
    (die_while_others_compute, "has ended without a word", "(die_while_others_compute)"),
    (die_before_a_group_is_made, "has ended without a word", "new_group"),
    (die_before_the_others_come, "has ended without a word", "rank 0 is in"),
    pytest.param(
        exit_with_a_status, "has left with exit status 3", "(exit_with_a_status)", marks=pytest.mark.slow
    ),
    (
        stay_away,
        "has not come to the others: it is in test_missing_ranks.py:",
        "(stay_away)",
    ),
    (hold_the_interpreter, "does not respond", "(hold_the_interpreter)"),
    (stop, "is stopped by a signal (SIGSTOP)", "ranks 0, 2 wait in"),
    (end_early, "has ended its run while others go on", "ranks 0, 2 wait in"),
]


@pytest.mark.parametrize(("main", "what", "others"), GONE, ids=lambda value: getattr(value, "__name__", ""))
def test_a_rank_that_is_gone_is_named_and_ends_the_others(main, what: str, others: str, tmp_path: Path):
    unable = (1,) if main in (stop, hold_the_interpreter) else ()
    statuses, output = run_ranks(main, tmp_path, killed=unable)
    assert statuses[0] == statuses[2] == 1, (statuses, output)
    assert len(_NAMED.findall(output)) == output.count("error: ") == 1, output
    (line,) = [line for line in output.splitlines() if _NAMED.match(line)]
    assert what in line and re.search(others, line), line
    assert "frame #" not in output and "Traceback" not in output, output


@pytest.mark.slow
def test_a_killed_rank_of_another_machine_is_named(tmp_path: Path):
    """Other ranks cannot see its process; they miss its heartbeat."""
    statuses, output = run_ranks(die, tmp_path, far_apart=True)
    assert statuses == [1, -9, 1], output
    assert len(_NAMED.findall(output)) == output.count("error: ") == 1, output
    assert "does not respond: it is gone, its host is, or its code holds the interpreter" in output


def train_until(rank: int, module: str, function: str) -> None:
    """Rank 1 dies where the run calls ``function`` of ``module``."""
    import importlib

    import pretrain_gpt

    if rank == 1:
        setattr(importlib.import_module(module), function, lambda *words, **named: os._exit(9))
    sys.argv = ["pretrain_gpt.py", *os.environ["WORDS"].split()]
    pretrain_gpt.main()


def die_in_an_evaluation(rank: int) -> None:
    train_until(rank, "megatron.training.evaluation", "_run_eval_iters")


def die_in_a_save(rank: int) -> None:
    train_until(rank, "megatron.training.checkpointing.save", "generate_state_dict")


@pytest.mark.parametrize(
    ("main", "phase"),
    [
        (die_in_an_evaluation, "an evaluation after iteration 3"),
        (die_in_a_save, "saving a checkpoint after iteration 2"),
    ],
)
def test_report_says_what_the_other_ranks_were_doing(main, phase: str, golden: Path, tmp_path: Path):
    saving = {"save": tmp_path / "ckpt", "save_interval": 2} if main is die_in_a_save else {}
    text = " ".join(map(str, tiny_gpt(golden, tmp_path, eval_interval=3, eval_iters=1, **saving)))
    changes = {rank: {"WORDS": text} for rank in range(2)}
    statuses, output = run_ranks(main, tmp_path, world_size=2, changes=changes)
    assert statuses == [1, 9], output
    assert len(_NAMED.findall(output)) == output.count("error: ") == 1, output
    assert f"Meanwhile rank 0 waits in {phase}, " in output


PLAIN_SCRIPT = """
import os
import pretrain_gpt
from megatron.training import training

train_step = training.train_step
iterations = []

def train_some_steps(*words):
    iterations.append(1)
    if len(iterations) == 3 and os.environ["RANK"] == "1":
        raise ValueError("a bug in a script")
    return train_step(*words)

training.train_step = train_some_steps
pretrain_gpt.main()
"""


def test_a_lost_rank_is_named_in_a_script_without_run_main(golden: Path, tmp_path: Path, repo_root: Path):
    """As the original's own: it calls ``pretrain`` and leaves errors to the interpreter."""
    (tmp_path / "script.py").write_text(PLAIN_SCRIPT)
    words = [sys.executable, str(tmp_path / "script.py"), *map(str, tiny_gpt(golden, tmp_path))]
    environment = {**os.environ, "PYTHONPATH": str(repo_root), "MEGATRON_DEVICE": "cpu", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    ranks = [
        subprocess.Popen(
            words, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, stdout=-1, stderr=-2, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [1, 1], outputs
    assert "".join(outputs).count("ValueError: a bug in a script") == 1, outputs
    assert f"[rank 1 on {HOST}] Traceback" in outputs[1]


def different_calls(rank: int) -> None:
    import torch
    import torch.distributed as dist

    join(TIMEOUT_S)
    if rank == 1:
        dist.broadcast(torch.ones(2), 0)
    dist.all_reduce(torch.ones(4))


def test_mismatched_collectives_are_listed_by_rank(tmp_path: Path):
    statuses, output = run_ranks(different_calls, tmp_path)
    assert statuses == [1, 1, 1], output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: ranks wait for each other in different calls, or with different sizes: "
    ), output
    assert "ranks 0, 2 wait in all_reduce of float32[4] at test_missing_ranks.py:" in line
    assert "rank 1 waits in broadcast of float32[2] at test_missing_ranks.py:" in line


def backward_fails(rank: int) -> None:
    import torch

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("no gradient here")

    join(60.0)
    add()
    x = torch.ones(2, requires_grad=True)
    if rank == 1:
        Failing.apply(x).sum().backward()
    add()


def test_an_error_in_backward_is_reported_by_its_rank(tmp_path: Path):
    statuses, output = run_ranks(backward_fails, tmp_path)
    assert statuses == [1, 1, 1], output
    assert output.count("ValueError: no gradient here") == output.count("Traceback") == 1, output
    assert f"[rank 1 on {HOST}] Traceback" in output


def rank_0_dies(rank: int) -> None:
    """With it goes the store."""
    join(60.0)
    add()
    time.sleep(1.0)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    add()


def test_rank_0_is_named_after_its_store_has_gone(tmp_path: Path):
    statuses, output = run_ranks(rank_0_dies, tmp_path)
    assert statuses == [-9, 1, 1], output
    assert output.count("error: ") == 1, output
    assert re.search(rf"error: rank 0 on {re.escape(HOST)} \(process \d+\) has ended without a word", output)
    assert "which rank 0 kept, is gone" in output and "frame #" not in output


def rank_0_stops_and_another_fails(rank: int) -> None:
    join(60.0)
    add()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 1:
        time.sleep(1.0)
        raise ValueError("the cause")
    time.sleep(1000)


def test_a_failing_rank_reports_although_the_store_does_not_reply(tmp_path: Path):
    statuses, output = run_ranks(rank_0_stops_and_another_fails, tmp_path, killed=(0,))
    assert statuses == [None, 1, 1], output
    assert output.count("ValueError: the cause") == 1, output
    # One word for the job, which is the cause, or what the others know of the store beside it.
    assert output.count("error: ") <= 2 and "frame #" not in output, output
