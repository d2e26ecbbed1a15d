"""``hccl`` between virtual NPUs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def device_tensor(values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=f"npu:{dist.get_rank()}")


def reductions(rank: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        t = device_tensor([rank, 2], dtype)
        dist.all_reduce(t)
        assert t.tolist() == [1, 4] and t.device == torch.device(f"npu:{rank}")
    t = device_tensor([rank, 2])
    work = dist.all_reduce(t, op=dist.ReduceOp.MAX, async_op=True)
    work.wait()
    assert t.tolist() == [1, 2]
    out = device_tensor([0])
    dist.reduce_scatter_tensor(out, device_tensor([1, 2 + rank]))
    assert out.tolist() == [(2, 5)[rank]]
    average = device_tensor([rank, 4])
    dist.all_reduce(average, op=dist.ReduceOp.AVG)
    assert average.tolist() == [0.5, 4]
    shares = device_tensor([0])
    dist.reduce_scatter_tensor(shares, device_tensor([1, 2 + rank]), op=dist.ReduceOp.AVG)
    assert shares.tolist() == [(1, 2.5)[rank]]


def exchanges(rank: int) -> None:
    out = device_tensor([0, 0])
    dist.all_gather_into_tensor(out, device_tensor([rank + 1]))
    assert out.tolist() == [1, 2]
    parts = [device_tensor([0]) for _ in range(2)]
    dist.all_gather(parts, device_tensor([rank + 1]))
    assert [part.item() for part in parts] == [1, 2]
    dist.all_to_all_single(out, device_tensor([10 * rank, 10 * rank + 1]))
    assert out.tolist() == [rank, 10 + rank]
    t = device_tensor([rank])
    dist.broadcast(t, 1)
    assert t.item() == 1
    received = device_tensor([-1])
    send = dist.P2POp(dist.isend, device_tensor([rank]), 1 - rank)
    for work in dist.batch_isend_irecv([send, dist.P2POp(dist.irecv, received, 1 - rank)]):
        work.wait()
    assert received.item() == 1 - rank
    gathered: list = [None, None]
    dist.all_gather_object(gathered, {"rank": rank})
    assert gathered == [{"rank": 0}, {"rank": 1}]
    dist.barrier()


def groups(rank: int) -> None:
    assert dist.get_backend() == "hccl"
    alone = [dist.new_group([each]) for each in range(2)][rank]
    t = device_tensor([5])
    dist.all_reduce(t, group=alone)
    assert t.item() == 5
    host = dist.new_group([0, 1], backend="gloo")
    t = torch.ones(2)
    dist.all_reduce(t, group=host)
    assert t.tolist() == [2, 2]


def refusals(rank: int) -> None:
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(2))
    with pytest.raises(RuntimeError, match="HCCL does not reduce"):
        dist.all_reduce(device_tensor([1.0], torch.float64))


CHECKS: dict[str, Callable[[int], None]] = {f.__name__: f for f in (reductions, exchanges, groups, refusals)}


def rank_main(rank: int, directory: str) -> None:
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    for name, check in CHECKS.items():
        check(rank)
        Path(directory, f"{name}-{rank}").touch()
    dist.destroy_process_group()


def test_collectives(tmp_path: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    # Forks: torch_npu is loaded, no device has been touched.
    mp.start_processes(rank_main, (str(tmp_path),), nprocs=2, start_method="fork")
    passed = {f"{name}-{rank}" for name in CHECKS for rank in (0, 1)}
    assert {file.name for file in tmp_path.glob("*-*")} == passed
