"""Level 2, ranks that share a sequence: ring, gathered and all-to-all attention on Ascend's operators.

The same runs, errors and fp64 reference as for the defaults.
"""

import json
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.unit_tests.context_parallel.split_world import Case, worst_errors

WINDOWS = (None, (2, 0), (4, 0), (50, 0))
CASES = [
    *(Case(kind, True, window) for kind in ("p2p", "all_gather", "a2a") for window in WINDOWS),
    Case("p2p", False, None),
    Case("p2p", False, (2, 2)),
    Case("p2p", True, (4, 0), 2),
    Case("p2p", True, None, 2, dtype="bfloat16"),
    Case("p2p", mask="documents"),
    Case("all_gather", mask="documents", dtype="float16"),
]
BOUNDS = {"float32": 6e-6, "bfloat16": 2.5e-2, "float16": 3e-3}


def run(rank: int, directory: str, world: int) -> None:
    import torch_npu  # noqa: F401

    import megatron_npu
    from megatron_npu.registry import replacements
    from tests.npu.cpu_kernels import install_on_cpu

    install_on_cpu()
    megatron_npu.activate()
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    errors = worst_errors(CASES)
    served = {r.name: dict(r.served_by_default) for r in replacements().values() if r.served_by_default}
    (Path(directory) / str(rank)).write_text(json.dumps([errors, served]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_parts_equal_the_whole(world: int, tmp_path: Path) -> None:
    mp.spawn(run, (str(tmp_path), world), nprocs=world)
    for rank in range(world):
        errors, served = json.loads((tmp_path / str(rank)).read_text())
        assert not served, "an operator should have taken every call"
        for case, worst in zip(CASES, errors, strict=True):
            assert max(worst) <= BOUNDS[case.dtype], (rank, case, worst)
