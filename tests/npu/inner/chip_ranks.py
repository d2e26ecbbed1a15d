"""Saturation mode on two ranks: an overflow on one of them skips the step on both."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def check(rank: int, directory: str, overflowing: int) -> None:
    import torch_npu  # noqa: F401

    import megatron_npu
    from megatron.core.fusions.multi_tensor import unscale_and_check, watch_overflow
    from megatron_npu.virtual.kernels.optimizer import OverflowFlag
    from tests.npu.cpu_kernels import install_on_cpu

    install_on_cpu()
    megatron_npu.activate()
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    scale = torch.ones(1)
    watch_overflow(scale)
    if rank == overflowing:
        OverflowFlag.raised = True
    # A stage without parameters of its own has no gradients, and takes part all the same.
    found = unscale_and_check([torch.ones(3)] if rank == 0 else [], scale)
    (Path(directory) / f"{overflowing}-{rank}").write_text(str(found.item()))
    dist.barrier()
    dist.destroy_process_group()


def test_every_rank_learns_of_it(tmp_path: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    for overflowing in (1, -1):
        directory = tmp_path / str(overflowing)
        directory.mkdir()
        mp.spawn(check, (str(directory), overflowing), nprocs=2)
        expected = "1.0" if overflowing == 1 else "0.0"
        assert [(directory / f"{overflowing}-{rank}").read_text() for rank in (0, 1)] == [expected] * 2
