"""Sizes of HCCL's buffers by what a group is for; ``inner/virtual_ranks`` makes groups with them."""

import re

import pytest

from megatron.core.errors import ConfigError
from megatron.core.parallel_state.groups import GROUP_LABELS
from megatron_npu import communicators
from tests.npu.ground import ROOT


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HCCL_BUFFSIZE", "P2P_HCCL_BUFFSIZE"):
        monkeypatch.delenv(name, raising=False)


def test_small_traffic_gets_small_buffers() -> None:
    assert communicators.SMALL < GROUP_LABELS
    assert communicators.buffer_mb(("mp",), {}) == communicators.SMALL_MB
    assert communicators.buffer_mb(("dp",), {}) == 200
    assert (
        communicators.buffer_mb(("mp", "tp"), {}) == 200
    )  # who shares a group gets what the largest use needs
    assert communicators.buffer_mb(("mp", "pp"), {"pp": 35}) == 35
    assert communicators.buffer_mb(("dp", "dp_cp"), {"dp": 400}) == 400
    assert communicators.buffer_mb(("dp", "dp_cp"), {"dp": 50, "dp_cp": 60}) == 60
    assert communicators.buffer_mb(("dp", "dp_cp", "tp_dp"), {"dp": 100}) == 100  # one name speaks for all
    assert communicators.buffer_mb(("pp", "embd"), {"pp": 1}) == communicators.SMALL_MB


def test_the_environment_sets_the_size_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCCL_BUFFSIZE", "120")
    assert communicators.buffer_mb(("dp",), {}) == 120
    assert communicators.buffer_mb(("dp",), {"dp": 300}) == 300
    assert communicators.buffer_mb(("embd",), {}) == communicators.SMALL_MB
    monkeypatch.setenv("HCCL_BUFFSIZE", "8")
    assert communicators.buffer_mb(("embd",), {}) == 8
    monkeypatch.setenv("HCCL_BUFFSIZE", "much")
    with pytest.raises(ConfigError, match="HCCL_BUFFSIZE=much: give a whole number of MB"):
        communicators.buffer_mb(("dp",), {})


def test_the_documented_names_are_those_of_the_groups() -> None:
    text = (ROOT / "docs" / "npu.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"sets sizes by group: ([^.]*)\.", text)
    assert set(re.findall(r"`(\w+)`", listed)) == GROUP_LABELS


def test_the_total_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [(("world",), 8), (("dp", "dp_cp"), 2), (("cp",), 1), (("mp",), 4), (("tp",), 2), (("pp",), 2)]
    sizes = {"pp": 30, "tp": 64}
    said = communicators.describe(groups, sizes)
    assert said == (
        "HCCL buffers take up to 708 MB of an NPU's memory: world 2 x 20, dp+dp_cp 2 x 200, mp 2 x 20, "
        "tp 2 x 64, pp 2 x 30, sending between stages 2 x 20"
    )
    monkeypatch.setenv("P2P_HCCL_BUFFSIZE", "0")
    assert "up to 668 MB" in communicators.describe(groups, sizes)
    assert communicators.describe([(("world",), 1)], {}) == "HCCL buffers take up to 0 MB of an NPU's memory"
