"""A failure on some ranks ends all of them soon, and is told once: with and without process groups."""

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from megatron.core.errors import CheckpointError, DataError
from megatron.training.entry import run_main
from tests.distributed import fork_server
from tests.reserved_port import ReservedPort

# Longer than any machine needs to end three ranks, and shorter than the sleep of those that nobody ends.
SLEEP_S = 1000
LIMIT_S = 300


def all_fail_before_the_rendezvous(rank: int) -> None:
    raise DataError("wrong everywhere")


def one_fails_before_the_rendezvous(rank: int) -> None:
    if rank == 1:
        raise DataError("wrong on one")
    time.sleep(SLEEP_S)


def one_fails_while_others_wait(rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if rank == 1:
        raise CheckpointError("no disk")
    dist.barrier()


def one_has_a_bug(rank: int) -> None:
    if rank == 1:
        _ = {}["missing"]
    time.sleep(SLEEP_S)


def all_end_well(rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    time.sleep(1.5 * rank)
    dist.destroy_process_group()


def all_leave_groups_behind(rank: int) -> None:
    """As a training run does, with a group in a cycle; by return, by exit, and by exit with a status of 0."""
    import torch.distributed as dist

    from megatron.core import parallel_state

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=3)
    holder = {"group": parallel_state.get_context_parallel_group()}
    holder["cycle"] = holder
    dist.barrier(holder["group"])
    if rank > 0:
        raise SystemExit(None if rank == 1 else 0)


def _print_threads() -> None:
    """Threads of gloo that have outlived the run, where the system lists threads."""
    names = []
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has ended since
            names.append(name.read_text().strip())
    os.write(1, "".join(f"{name}\n" for name in names if name.startswith(("gloo", "pt_gloo"))).encode())


def _child(main, rank: int, port: int, output: str) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    os.environ["TORCHELASTIC_ERROR_FILE"] = f"{output}.{rank}"
    try:
        run_main(lambda: main(rank))
    finally:
        _print_threads()


def run_three(main, tmp_path: Path) -> tuple[list[int], str]:
    """Exit statuses of three ranks, and all they wrote."""
    output = tmp_path / "output"
    context = fork_server.context()
    with ReservedPort("localhost") as port:
        where = (port.number, str(output))
        ranks = [context.Process(target=_child, args=(main, rank, *where)) for rank in range(3)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + LIMIT_S
        for process in ranks:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
    return [process.exitcode for process in ranks], output.read_text()


@pytest.mark.parametrize(
    ("main", "printing", "message"),
    [
        (all_fail_before_the_rendezvous, 0, "error: wrong everywhere\n"),
        (one_fails_before_the_rendezvous, 1, "error: wrong on one\n"),
        (one_fails_while_others_wait, 1, "error: no disk\n"),
        (one_has_a_bug, 1, "Traceback (most recent call last):"),
    ],
)
def test_all_ranks_end_and_one_reports_the_cause(main, printing: int, message: str, tmp_path: Path):
    statuses, output = run_three(main, tmp_path)
    assert statuses == [1, 1, 1], output
    told = f"[rank {printing} on {socket.gethostname()}] {message}"
    assert output.count(told) == output.count(" on " + socket.gethostname()) == 1, output
    assert [path.name for path in tmp_path.glob("output.*")] == [f"output.{printing}"]


def test_torchrun_prints_the_cause_last(tmp_path: Path):
    """As torchrun formats what its processes leave: the rank that told why is the root cause."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    run_three(one_fails_while_others_wait, tmp_path)
    files = [tmp_path / f"output.{rank}" for rank in range(3)]
    failures = {rank: ProcessFailure(rank, 1000 + rank, 1, str(file)) for rank, file in enumerate(files)}
    summary = str(ChildFailedError("pretrain_gpt.py", failures))
    root_cause = summary.split("Root Cause")[1]
    assert "rank      : 1 " in root_cause and "error: no disk" in root_cause, summary


def test_ranks_may_end_at_different_times(tmp_path: Path):
    statuses, output = run_three(all_end_well, tmp_path)
    assert (statuses, output) == ([0, 0, 0], "")


def test_process_groups_end_before_the_interpreter(tmp_path: Path):
    statuses, output = run_three(all_leave_groups_behind, tmp_path)
    assert (statuses, output) == ([0, 0, 0], "")
