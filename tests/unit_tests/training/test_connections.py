"""Gloo beside a device's collectives does not connect every rank with every other."""

import contextlib
import os
from argparse import Namespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.core import accelerator
from megatron.training import initialize
from tests.distributed.pool import run_ranks

RANKS = 8


def connections() -> int:
    opened = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            opened += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return opened


def new_connections(accelerated: bool) -> tuple[int, list[Any], float]:
    """Connections of a new group of all ranks, and what its messages bring."""
    with mock.patch.object(accelerator, "is_accelerated", lambda: accelerated), mock.patch.dict(os.environ):
        os.environ.pop("TORCH_GLOO_LAZY_INIT", None)
        initialize._connect_hosts_on_demand()
        before = connections()
        group = dist.new_group(backend="gloo")
        opened = connections() - before
        said: list[Any] = [None] * RANKS
        dist.all_gather_object(said, {"rank": dist.get_rank()}, group=group)
        total = torch.ones(3)
        dist.all_reduce(total, group=group)
        dist.barrier(group=group)
        return opened, [each["rank"] for each in said], float(total.sum())


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_gloo_groups_beside_a_device_connect_on_demand() -> None:
    messages = (list(range(RANKS)), 3.0 * RANKS)
    on_a_device, alone = (run_ranks(RANKS, new_connections, accelerated) for accelerated in (True, False))
    for opened, *found in alone:
        assert opened >= RANKS - 1 and tuple(found) == messages
    for opened, *found in on_a_device:
        assert opened < RANKS // 2 and tuple(found) == messages


def test_connections_on_demand_are_set_before_the_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "is_accelerated", lambda: True)
    monkeypatch.setattr(accelerator, "set_device", lambda rank: None)
    for name in ("collective_backend", "world_backend"):
        monkeypatch.setattr(accelerator, name, lambda *unused: "gloo")
    monkeypatch.setattr(initialize, "_world_options", lambda args: None)
    monkeypatch.setattr(initialize, "_rendezvous", lambda args: None)
    monkeypatch.setattr(os, "environ", {})
    seen = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda **kw: seen.append(os.environ["TORCH_GLOO_LAZY_INIT"])
    )
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    args = Namespace(
        local_rank=0,
        rank=0,
        world_size=2,
        distributed_backend="nccl",
        distributed_timeout_minutes=1,
        bf16=False,
    )
    args.enable_gloo_process_groups = True
    args.tensor_model_parallel_size = args.context_parallel_size = 1
    initialize._join_world(args)
    assert seen == ["1"]
