"""Learning rate and weight decay against figures measured on Megatron-LM core_v0.12.1."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron.core.errors import CheckpointError, ConfigError
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

CASES = json.loads((Path(__file__).parents[2] / "golden/optim/lr_schedules.json").read_text())["cases"]
SETTINGS = {
    "init_lr": 0.0,
    "max_lr": 1e-3,
    "min_lr": 1e-5,
    "lr_warmup_steps": 80,
    "lr_decay_steps": 1280,
    "lr_decay_style": "cosine",
    "start_wd": 0.01,
    "end_wd": 0.01,
    "wd_incr_steps": 1600,
    "wd_incr_style": "constant",
    "use_checkpoint_opt_param_scheduler": False,
}


def make_groups() -> list[dict[str, Any]]:
    """Two groups as the optimizer makes them, and one with a decoupled learning rate."""
    limits = {"max_lr": 1e-3, "min_lr": 1e-5, "is_decoupled_lr": False, "lr_mult": 1.0}
    return [
        {"wd_mult": 1.0, **limits},
        {"wd_mult": 0.0, **limits},
        {"wd_mult": 1.0, "lr_mult": 1.0, "max_lr": 5e-3, "min_lr": 1e-4, "is_decoupled_lr": True},
    ]


def make(groups: list[dict[str, Any]] | None = None, **changes: Any) -> OptimizerParamScheduler:
    optimizer = SimpleNamespace(param_groups=make_groups() if groups is None else groups)
    return OptimizerParamScheduler(optimizer, **{**SETTINGS, **changes})


@pytest.mark.parametrize("name", CASES)
def test_follows_the_golden_schedule(name: str) -> None:
    case = CASES[name]
    groups = [{}, {"wd_mult": 0.0}, {"lr_mult": 0.5, "max_lr": 3e-3, "min_lr": 2e-5}]
    scheduler = make(groups, **case["settings"])
    decays = case["wd"] if isinstance(case["wd"], list) else [case["wd"]] * len(case["lr"])
    for position, (lr, decay) in enumerate(zip(case["lr"], decays, strict=True)):
        assert groups[0]["lr"] == pytest.approx(lr, rel=1e-12, abs=1e-18), position
        assert groups[0]["weight_decay"] == pytest.approx(decay, rel=1e-12), position
        assert groups[1]["weight_decay"] == 0.0
        if "lr_group3" in case:
            assert groups[2]["lr"] == pytest.approx(case["lr_group3"][position], rel=1e-12, abs=1e-18)
        scheduler.step(case["increment"])


def test_an_inverse_square_root_without_warmup_counts_from_the_first_sample() -> None:
    scheduler = make(
        lr_decay_style="inverse-square-root", lr_warmup_steps=0, init_lr=0.0, max_lr=1e-3, min_lr=0.0
    )
    rates = []
    for steps in (0, 1, 3):
        scheduler.step(steps)  # to 0, 1 and 4 samples
        rates.append(scheduler.get_lr({}))
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4], rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_state_has_the_golden_layout(name: str) -> None:
    case = CASES[name]
    scheduler = make(**case["settings"])
    scheduler.step(case["state_dict"]["num_steps"])
    assert scheduler.state_dict() == case["state_dict"]


def test_resumes_where_it_stopped() -> None:
    stopped = make()
    stopped.step(333)
    resumed = make()
    resumed.load_state_dict(stopped.state_dict())
    assert resumed.num_steps == 333
    assert resumed.optimizer.param_groups == stopped.optimizer.param_groups


def test_reads_old_key_names() -> None:
    new = make()
    new.step(333)
    old = new.state_dict()
    renamed = {
        "max_lr": "start_lr",
        "lr_warmup_steps": "warmup_iter",
        "lr_decay_steps": "end_iter",
        "lr_decay_style": "decay_style",
        "num_steps": "num_iters",
    }
    for name, old_name in renamed.items():
        old[old_name] = old.pop(name)
    for name in ("start_wd", "end_wd", "wd_incr_style", "wd_incr_steps"):
        del old[name]
    resumed = make()
    resumed.load_state_dict(old)
    assert resumed.optimizer.param_groups == new.optimizer.param_groups


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_lr", 2e-3),
        ("min_lr", 2e-5),
        ("lr_warmup_steps", 40),
        ("lr_decay_steps", 2560),
        ("lr_decay_style", "linear"),
        ("wd_incr_steps", 3200),
    ],
)
def test_a_different_checkpoint_is_refused_naming_field_and_remedies(name: str, value: Any) -> None:
    saved = {**make().state_dict(), name: value}
    with pytest.raises(CheckpointError) as error:
        make().load_state_dict(saved)
    for words in (name, str(value), "override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"):
        assert words in str(error.value)


def load_as_after_optimizer(scheduler: OptimizerParamScheduler, saved: OptimizerParamScheduler) -> None:
    """Loads a scheduler's state after that of the optimizer, which replaces the param groups' values."""
    for group, saved_group in zip(
        scheduler.optimizer.param_groups, saved.optimizer.param_groups, strict=True
    ):
        group.update(saved_group)
    scheduler.load_state_dict(saved.state_dict())


@pytest.mark.parametrize("winner", ["override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"])
def test_the_switches_decide_for_all_groups(winner: str) -> None:
    saved = make()
    saved.step(640)
    groups = make_groups()
    groups[0]["max_lr"] = groups[1]["max_lr"] = 2e-3
    groups[2]["max_lr"] = 7e-3
    resumed = make(groups, max_lr=2e-3, **{winner: True})
    load_as_after_optimizer(resumed, saved)
    ours = winner == "override_opt_param_scheduler"
    assert resumed.max_lr == (2e-3 if ours else 1e-3)
    assert [group["max_lr"] for group in groups] == ([2e-3, 2e-3, 7e-3] if ours else [1e-3, 1e-3, 5e-3])
    fresh = make([dict(group) for group in groups], max_lr=resumed.max_lr)
    fresh.step(640)
    assert [group["lr"] for group in groups] == [group["lr"] for group in fresh.optimizer.param_groups]


def test_a_different_decoupled_rate_is_refused() -> None:
    saved = make()
    groups = make_groups()
    groups[2]["max_lr"] = 7e-3
    with pytest.raises(CheckpointError, match="decoupled_lr and decoupled_min_lr are"):
        load_as_after_optimizer(make(groups), saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr_decay_style": "cosin"}, ["'cosin'", "inverse-square-root"]),
        ({"lr_warmup_steps": 1280}, ["1280", "shorten"]),
        ({"min_lr": 1e-2}, ["below min_lr"]),
        ({"init_lr": 1.0}, ["init_lr"]),
        ({"min_lr": None}, ["min_lr None is no rate", "min_lr=0.0"]),
        ({"max_lr": None, "init_lr": None}, ["init_lr and max_lr None"]),
        ({"lr_decay_steps": 0}, ["lr_decay_steps 0"]),
        ({"lr_decay_style": "WSD"}, ["wsd_decay_steps", "lr_wsd_decay_style"]),
        ({"end_wd": 0.1}, ["constant weight decay"]),
        ({"wd_incr_style": "linear", "end_wd": 0.001}, ["only grows"]),
        (
            {"use_checkpoint_opt_param_scheduler": True, "override_opt_param_scheduler": True},
            ["exclude each other"],
        ),
        ({"lr_decay_style": "cosin", "min_lr": -1.0}, ["'cosin'", "negative"]),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make(**changes)
    for word in words:
        assert word in str(error.value)
