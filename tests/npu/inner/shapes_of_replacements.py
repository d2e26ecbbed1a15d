"""Level 1: every case on a fake NPU, through torch_npu's schemas, shape functions and derivative formulas.

Nothing is computed. What comes back must have the shapes of the default's results, and the operators that a
replacement declares must have been called.
"""

import collections
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch import library as torch_library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from megatron.core import overrides
from megatron.core.fusions.attention_masks import masked_by_band
from megatron_npu import activation
from megatron_npu.checking.case import Call, Case, execute
from megatron_npu.checking.cases import CASES
from megatron_npu.core.fusions.attention_masks import compressed_mask
from megatron_npu.registry import replacements

activation.declare_all()
TRIED = [(case, dtype) for case in CASES for dtype in case.dtypes or replacements()[case.path].dtypes]
CALLED: dict[str, set[str]] = collections.defaultdict(set)


class Recorder(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module", autouse=True)
def missing_shape_functions():
    """What torch_npu 2.13 lacks (flags, the functional AdamW) or has with a wrong signature (GEGLU)."""
    library = torch_library.Library("npu", "IMPL")
    status = lambda input, mode=0: torch.empty_like(input)  # noqa: E731
    library.impl("npu_get_float_status", status, "Meta")
    library.impl("npu_clear_float_status", status, "Meta")
    library.impl(
        "npu_geglu_grad",
        lambda grad, input, gelu, *_, **__: torch.empty_like(input),
        "Meta",
        allow_override=True,
    )
    yield
    library._destroy()


@pytest.fixture(scope="module")
def fake():
    """One mode for all, because masks are cached as tensors of it."""
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    for cache in (masked_by_band, compressed_mask):
        cache.cache_clear()
    yield mode
    for cache in (masked_by_band, compressed_mask):
        cache.cache_clear()


@pytest.fixture(scope="module", autouse=True)
def one_of_two_ranks() -> Iterator[None]:
    """A process group in which nobody answers and nobody waits; NPU tensors have a backend with a name."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    type(backend).get_hccl_comm_name = lambda self, rank: f"made for rank {rank}"
    dist.group.WORLD._register_backend(torch.device("npu"), dist.ProcessGroup.BackendType.CUSTOM, backend)
    yield
    dist.destroy_process_group()


def on_the_npu(call: Call, mode: FakeTensorMode) -> Call:
    def like(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="npu:0")

    with mode:
        args, kwargs = tree_map_only(Tensor, like, (call.args, call.kwargs))
        for position in call.wanted:
            args[position].requires_grad_()
    return Call(args, kwargs, call.wanted)


@pytest.mark.parametrize(
    ("case", "dtype"), TRIED, ids=[f"{c.path.split('.')[-1]}-{c.name}-{str(d)[6:]}" for c, d in TRIED]
)
def test_shapes(case: Case, dtype: torch.dtype, fake: FakeTensorMode) -> None:
    replacement = replacements()[case.path]
    wanted = execute(overrides.default_of(case.path), case, case.call(dtype, "cpu"))
    call = on_the_npu(case.call(dtype, "cpu"), fake)
    assert replacement.why_not_now(call.args, call.kwargs) is None
    with fake, Recorder() as recorder:
        found = execute(replacement.function, case, call)
    for some, expected in zip(found, wanted, strict=True):
        assert [t.shape for t in some] == [t.shape for t in expected]
        assert {t.device.type for t in some} <= {"npu"}
        for t, other in zip(some, expected, strict=True):
            # Blocks may be handed on in the type of the operands or wider.
            assert t.dtype == other.dtype or (".block_attention." in case.path and t.dtype == dtype)
    # Some derivative formulas call their operator by a name with an underscore, which returns more.
    called = {name.split(".")[1].lstrip("_") for name in recorder.names if name.startswith("npu.")}
    assert called & set(replacement.operators), recorder.names
    CALLED[case.path] |= called


def test_every_replacement_called_all_its_operators() -> None:
    if len({path for path, _ in ((c.path, d) for c, d in TRIED)}) != len(CALLED):
        pytest.skip("only some of the cases were run")
    for path, replacement in replacements().items():
        assert CALLED[path] <= set(replacement.operators) | {f"{n}_grad" for n in replacement.operators} | {
            f"{n}_backward" for n in replacement.operators
        }, path
    assert {name for path in CALLED for name in CALLED[path]} >= {
        name for replacement in replacements().values() for name in replacement.operators
    }
