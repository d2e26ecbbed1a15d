"""Ranks that run a function of a test under ``run_main``: processes of their own, without a model."""

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from megatron.training.entry import run_main
from megatron.training.ranks import heartbeat
from tests.distributed import fork_server

LIMIT_S = 90


def join(timeout_s: float, limit_s: float = 60.0) -> None:
    """Join the other ranks, as ``initialize_megatron`` does.

    Args:
        timeout_s: of the collectives.
        limit_s: longest wait for the others.
    """
    import torch.distributed as dist

    from megatron.training.global_vars import get_failure_watcher

    watcher = get_failure_watcher()
    watcher.time_limit_s = timeout_s
    dist.init_process_group(
        "gloo",
        store=watcher.rendezvous(limit_s, {}),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=timeout_s),
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _child(
    main: Callable[[int], None], rank: int, environment: dict[str, str], output: str, far_apart: bool
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(environment)
    if far_apart:
        heartbeat._machine = lambda: f"machine {rank}"
    run_main(lambda: main(rank))


def run_ranks(
    main: Callable[[int], None],
    tmp_path: Path,
    world_size: int = 3,
    missing: tuple[int, ...] = (),
    killed: tuple[int, ...] = (),
    changes: dict[int, dict[str, str]] | None = None,
    far_apart: bool = False,
) -> tuple[list[int | None], str]:
    """Exit statuses of all ranks, and all they wrote.

    Args:
        main: called with the rank.
        tmp_path: for the output.
        missing: ranks that are not started.
        killed: ranks that cannot end by themselves, and are killed when the others have.
        changes: environment by rank, in place of what it would be given.
        far_apart: let ranks take each other for processes of other machines.
    """
    output, port = tmp_path / "output", str(free_port())
    started = {}
    for rank in range(world_size):
        if rank in missing:
            continue
        environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"MEGATRON_DEVICE": "cpu", **(changes or {}).get(rank, {})}
        words = (main, rank, environment, str(output), far_apart)
        started[rank] = fork_server.context().Process(target=_child, args=words)
    for process in started.values():
        process.start()
    deadline = time.monotonic() + LIMIT_S
    for rank, process in started.items():
        if rank not in killed:
            process.join(max(0.1, deadline - time.monotonic()))
    ended = [process.exitcode for process in started.values()]
    for process in started.values():
        process.kill()
        process.join()
    return ended, output.read_text()
