"""Level 2, split layers: kernels that send while they multiply, against separate traffic in fp64."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.tensor_parallel import deferred_gradients
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.overlap import FusedMatmuls
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

# [s, b, IN] -> [s, b, OUT] -> [s, b, IN], and for a kernel too small a part of OUT.
LENGTH, BATCH, IN = 16, 2, 256
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
MC2 = ("all_gather_matmul", "matmul_reduce_scatter")


def random(number: int, *shape: int) -> Tensor:
    """Numbers of eight bits."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(number)).bfloat16()


def run_layers(out: int, dtype: torch.dtype, fused: bool, late: bool = False) -> list[Tensor]:
    """Output and gradients of a column-parallel and a row-parallel layer; the same operands in any type."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    config = TransformerConfig(
        num_layers=1, hidden_size=IN, num_attention_heads=8, tensor_model_parallel_size=ranks,
        sequence_parallel=True, params_dtype=dtype, tp_comm_fused_matmul=fused,
    )  # fmt: skip
    values = {shape: random(5 + shape[0], *shape) / 16 for shape in ((out, IN), (IN, out))}
    options = {"config": config, "init_method": lambda t: t.copy_(values[tuple(t.shape)]), "bias": False}
    first = ColumnParallelLinear(IN, out, **options)
    second = RowParallelLinear(out, IN, input_is_parallel=True, skip_bias_add=True, **options)
    assert isinstance(first.overlap, FusedMatmuls) == isinstance(second.overlap, FusedMatmuls) == fused
    x, grad = (random(n, LENGTH, BATCH, IN).to(dtype).chunk(ranks)[rank] for n in (1, 2))
    x = x.clone().requires_grad_()
    y = second(torch.tanh(first(x)[0]))[0]
    if late:
        with deferred_gradients.deferring():
            y.backward(grad)
        assert deferred_gradients.pending() == 2
        deferred_gradients.run()
    else:
        y.backward(grad)
    return [y.detach(), x.grad, first.weight.grad, second.weight.grad]


def rank_main(rank: int, directory: str, world: int) -> None:
    import torch_npu  # noqa: F401

    import megatron_npu
    from megatron_npu.registry import replacements
    from tests.npu import cpu_kernels

    cpu_kernels.install_on_cpu()
    megatron_npu.activate()
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(world)
    model_parallel_cuda_manual_seed(1)
    cpu_kernels.register_gloo(parallel_state.get_tensor_model_parallel_group())

    def worst(out: int, late: bool = False) -> list[float]:
        wanted = run_layers(out, torch.float64, False)
        found = (run_layers(out, dtype, True, late) for dtype in BOUNDS)
        return [
            max(float((f - w).norm() / w.norm()) for f, w in zip(some, wanted, strict=True)) for some in found
        ]

    def to_default() -> list[dict[str, int]]:
        return [dict(r.served_by_default) for r in replacements().values() if r.name in MC2]

    found = [worst(256 * world, late) for late in (False, True)]
    assert to_default() == [{}, {}], "an operator should have taken every call"
    found.append(worst(128 * world))
    small = {"inner sizes below 256 or beyond 65534": 2 * len(BOUNDS)}
    assert to_default() == [{}, small], "what a rank holds is too small for an operator"
    (Path(directory) / str(rank)).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_layers(world: int, tmp_path: Path) -> None:
    mp.spawn(rank_main, (str(tmp_path), world), nprocs=world)
    for rank in range(world):
        for errors in json.loads((tmp_path / str(rank)).read_text()):
            assert all(e < bound for e, bound in zip(errors, BOUNDS.values(), strict=True)), (rank, errors)
