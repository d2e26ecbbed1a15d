"""Loss scales against figures measured on Megatron-LM core_v0.12.1."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.core.optimizer import ConstantGradScaler, DynamicGradScaler

CASES = json.loads((Path(__file__).parents[2] / "golden/optim/loss_scaler.json").read_text())["cases"]
SETTINGS = {
    "initial_scale": 65536.0,
    "min_scale": 1.0,
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 5,
    "hysteresis": 2,
}


def figures(scaler: DynamicGradScaler) -> list[float]:
    state = scaler.state_dict()
    assert state["scale"].shape == (1,)
    assert state["scale"].dtype == torch.float32
    return [state["scale"].item(), state["growth_tracker"], state["hysteresis_tracker"]]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_follows_the_golden_scale(case: dict[str, Any]) -> None:
    scaler = DynamicGradScaler(**case["settings"])
    for found_inf, after in zip(case["found_inf"], case["after"], strict=True):
        scaler.update(bool(found_inf))
        assert figures(scaler) == after
        assert scaler.inv_scale.item() == 1.0 / after[0]


@pytest.mark.parametrize("stop", [0, 3, 7, 12])
def test_resumes_where_it_stopped(stop: int) -> None:
    case = CASES[1]
    first, second = DynamicGradScaler(**case["settings"]), DynamicGradScaler(**case["settings"])
    for found_inf in case["found_inf"][:stop]:
        first.update(bool(found_inf))
    second.load_state_dict(first.state_dict())
    for found_inf, after in zip(case["found_inf"][stop:], case["after"][stop:], strict=True):
        second.update(bool(found_inf))
        assert figures(second) == after


def test_the_window_may_be_a_float() -> None:
    scaler = DynamicGradScaler(**{**SETTINGS, "growth_interval": 2.0})
    scaler.update(False)
    scaler.update(False)
    assert scaler.scale.item() == 131072.0


def test_constant_scale_ignores_overflows() -> None:
    scaler = ConstantGradScaler(128.0)
    scaler.update(True)
    assert scaler.scale.item() == 128.0
    assert scaler.state_dict() == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"initial_scale": 0.0},
        {"min_scale": 1e6},
        {"growth_factor": 1.0},
        {"backoff_factor": 1.0},
        {"backoff_factor": 0.0},
        {"growth_interval": 0},
        {"hysteresis": 0},
    ],
)
def test_settings_that_cannot_work(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        DynamicGradScaler(**{**SETTINGS, **wrong})
