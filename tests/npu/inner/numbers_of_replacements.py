"""Level 2: every case in numbers, forward and backward, with CPU kernels under torch_npu's schemas.

The derivative formulas are torch_npu's own. The judge is the default in fp64 on the same rounded operands.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_npu import activation
from megatron_npu.checking.case import Case
from megatron_npu.checking.cases import CASES
from megatron_npu.checking.compare import judge
from megatron_npu.registry import replacements
from tests.npu import cpu_kernels

cpu_kernels.install_on_cpu()
activation.declare_all()
TRIED = [(case, dtype) for case in CASES for dtype in case.dtypes or replacements()[case.path].dtypes]


@pytest.mark.parametrize(
    ("case", "dtype"), TRIED, ids=[f"{c.path.split('.')[-1]}-{c.name}-{str(d)[6:]}" for c, d in TRIED]
)
def test_numbers(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    if not case.among_ranks:
        check(case, dtype)
        return
    for world in (2, 4):
        directory = tmp_path / str(world)
        directory.mkdir()
        # Forks: a case is made of functions that cannot be sent.
        mp.start_processes(check_on_rank, (case, dtype, world, directory), nprocs=world, start_method="fork")
        assert len(list(directory.glob("rank*"))) == world


def check(case: Case, dtype: torch.dtype) -> None:
    finding = judge(replacements()[case.path], case, dtype, torch.device("cpu"))
    assert finding.good, finding


def check_on_rank(rank: int, case: Case, dtype: torch.dtype, world: int, directory: Path) -> None:
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    cpu_kernels.register_gloo(dist.group.WORLD)
    call = case.call(dtype, "cpu")
    assert replacements()[case.path].why_not_now(call.args, call.kwargs) is None
    check(case, dtype)
    (directory / f"rank{rank}").touch()
    dist.destroy_process_group()
