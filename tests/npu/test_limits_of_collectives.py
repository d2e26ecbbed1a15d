"""Which calls of products that send while they multiply go to the default; needs no torch_npu."""

import pytest
import torch
import torch.distributed as dist

from megatron_npu import activation, chip
from megatron_npu.registry import Replacement, replacements

activation.declare_all()
POINTS = "megatron.core.fusions.matmul."


class Group:
    """Stands for the process group of some global ranks."""

    def __init__(self, *ranks: int):
        self.ranks = list(ranks)


@pytest.fixture(autouse=True)
def groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_world_size", lambda group: len(group.ranks))
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: group.ranks)
    monkeypatch.setattr(chip, "is_910_93", lambda: False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def reason(name: str, group: Group, inner: int = 256, dtype: torch.dtype = torch.bfloat16) -> str | None:
    replacement: Replacement = replacements()[POINTS + name]
    x, matrix = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((32, inner), (inner, 8)))
    keep = (False,) if name == "all_gather_matmul" else ()
    return replacement.why_not_now((x, matrix, group, *keep), {})


@pytest.mark.parametrize("name", ["all_gather_matmul", "matmul_reduce_scatter"])
def test_limits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Group(0, 1)
    assert reason(name, pair) is None
    assert reason(name, pair, inner=65534) is None
    for inner in (255, 65535):
        assert reason(name, pair, inner) == "inner sizes below 256 or beyond 65534"
    assert reason(name, pair, dtype=torch.float32) == "dtype float32"
    assert reason(name, Group(*range(8))) is None
    assert reason(name, Group(0, 1, 2)) == "3 ranks"
    assert reason(name, Group(*range(16))) == "16 ranks"
    monkeypatch.setattr(chip, "is_910_93", lambda: True)
    assert reason(name, Group(*range(16))) is None


@pytest.mark.parametrize("name", ["all_gather_matmul", "matmul_reduce_scatter"])
def test_links_end_with_the_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    across = Group(3, 4)
    assert reason(name, across) is None, "one machine, as long as nobody says otherwise"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert reason(name, across) == "ranks on several machines"
    assert reason(name, Group(4, 5, 6, 7)) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert reason(name, across) is None


@pytest.mark.parametrize(
    ("soc", "served"), [(104, False), (202, False), (221, True), (240, False), (251, True), (260, False)]
)
def test_chips(soc: int, served: bool) -> None:
    for name in ("all_gather_matmul", "matmul_reduce_scatter"):
        assert replacements()[POINTS + name].chips.include(soc) == served
