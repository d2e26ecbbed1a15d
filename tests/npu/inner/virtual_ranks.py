"""``hccl`` between virtual NPUs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron.core import accelerator, parallel_state, process_groups
from megatron.training import agreement, dist_signal_handler
from megatron_npu import communicators
from megatron_npu.virtual import collectives


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


def host_tensors_beside_hccl(rank: int) -> None:
    """In the product's world: flags, objects and host tensors by gloo, tensors of the NPU by hccl."""
    assert process_groups.backends() == {"cpu": "gloo", "npu": "hccl"}
    t = torch.tensor([rank + 1.0])
    dist.all_reduce(t)
    assert t.tolist() == [3]
    on_device = device_tensor([rank + 1])
    dist.all_reduce(on_device)
    assert on_device.item() == 3 and on_device.device.type == "npu"
    told: list = [{"from": rank}]
    dist.broadcast_object_list(told, src=1)
    gathered: list = [None, None]
    dist.all_gather_object(gathered, rank)
    assert (told, gathered) == ([{"from": 1}], [0, 1])
    assert agreement.extremes(rank) == (0, 1) and agreement.any_rank(rank == 1)
    assert dist_signal_handler.all_gather_item(rank, torch.int32) == [0, 1]
    dist.barrier()


def groups_of_the_product(rank: int) -> None:
    """Each carries the NPU's tensors alone, with buffers for what it is for; messages find their way."""
    parallel_state.initialize_model_parallel(2, communicator_buffers_mb={"tp": 300})
    tensor_parallel = parallel_state.get_tensor_model_parallel_group()
    assert process_groups.backends(tensor_parallel) == {"npu": "hccl"}
    assert parallel_state.get_model_parallel_group() is tensor_parallel
    assert buffer_of(tensor_parallel) == 300
    assert buffer_of(parallel_state.get_data_parallel_group()) == 200
    assert buffer_of(dist.group.WORLD) == communicators.SMALL_MB
    assert dist_signal_handler.all_gather_item(rank, torch.int32, tensor_parallel) == [0, 1]
    gathered: list = [None, None]
    dist.all_gather_object(gathered, rank, group=tensor_parallel)
    assert gathered == [0, 1]
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, 2, communicator_buffers_mb={"pp": 33})
    assert buffer_of(parallel_state.get_pipeline_model_parallel_group()) == 33
    assert buffer_of(parallel_state.get_embedding_group()) == 33  # the same ranks, so the same group
    host = parallel_state.get_data_parallel_group_gloo()
    assert process_groups.backends(host)["cpu"] == "gloo"
    parallel_state.destroy_model_parallel()


def buffer_of(group: dist.ProcessGroup) -> int:
    return collectives.SETTINGS[group.group_name]["hccl_buffer_size"]


def listed(*checks: Callable[[int], None]) -> dict[str, Callable[[int], None]]:
    return {check.__name__: check for check in checks}


WORLDS = {
    "hccl": listed(reductions, exchanges, groups, refusals),
    "the product's": listed(reductions, exchanges, host_tensors_beside_hccl, groups_of_the_product),
}


def rank_main(rank: int, world: str, directory: str) -> None:
    torch.npu.set_device(rank)
    options = None
    if world != "hccl":
        world, options = accelerator.world_backend("nccl"), process_groups.communicator_options(["world"], {})
    dist.init_process_group(
        world, init_method=f"file://{directory}/store", rank=rank, world_size=2, pg_options=options
    )
    for name, check in WORLDS["hccl" if options is None else "the product's"].items():
        check(rank)
        Path(directory, f"{name}-{rank}").touch()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", WORLDS)
def test_collectives(tmp_path: Path, world: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    # Forks: torch_npu is loaded, no device has been touched.
    mp.start_processes(rank_main, (world, str(tmp_path)), nprocs=2, start_method="fork")
    passed = {f"{name}-{rank}" for name in WORLDS[world] for rank in (0, 1)}
    assert {file.name for file in tmp_path.glob("*-*")} == passed


def test_the_real_options_take_a_size() -> None:
    options = communicators.options(("mp",), {})
    assert type(options).__module__.startswith("torch_npu")
    assert options.hccl_config == {"hccl_buffer_size": communicators.SMALL_MB}
    assert communicators.options(("dp",), {"dp": 400}).hccl_config == {"hccl_buffer_size": 400}
