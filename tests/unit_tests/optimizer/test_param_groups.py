"""Which parameters decay, and at which rates."""

import pytest
import torch

from megatron.core.errors import ConfigError, NotBuiltYetError
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.param_groups import _get_param_groups
from tests.unit_tests.test_public_names import problems_in

RATES = {"lr": 1e-3, "min_lr": 1e-5, "decoupled_lr": None, "decoupled_min_lr": None}


class Toy(torch.nn.Module):
    """Parameters in the order norm, embedding, linear: the first group does not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(4)
        self.embedding = torch.nn.Embedding(8, 4)
        self.linear = torch.nn.Linear(4, 4)
        self.frozen = torch.nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.embedding.weight.is_embedding_or_output_parameter = True


def names(toy: Toy, groups: list[dict]) -> list[list[str]]:
    by_param = {param: name for name, param in toy.named_parameters()}
    return [[by_param[param] for param in group["params"]] for group in groups]


def test_vectors_and_biases_do_not_decay() -> None:
    toy = Toy()
    groups = _get_param_groups([toy], None, None, 1.0, **RATES)
    assert names(toy, groups) == [
        ["norm.weight", "norm.bias", "linear.bias"],
        ["embedding.weight", "linear.weight"],
    ]
    expected = {
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "max_lr": 1e-3,
        "min_lr": 1e-5,
    }
    for group, wd_mult in zip(groups, (0.0, 1.0), strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {"wd_mult": wd_mult, **expected}


def test_a_bias_of_two_dimensions_does_not_decay() -> None:
    toy = Toy()
    toy.linear.bias = torch.nn.Parameter(torch.zeros(1, 4))
    groups = _get_param_groups([toy], None, None, 1.0, **RATES)
    assert "linear.bias" in names(toy, groups)[0]


def test_conditions_of_the_caller() -> None:
    toy = Toy()
    groups = _get_param_groups(
        [toy], lambda name, param: "norm" in name, lambda name, param: name.startswith("linear"), 0.1, **RATES
    )
    assert names(toy, groups) == [
        ["norm.weight", "norm.bias"],
        ["embedding.weight"],
        ["linear.weight", "linear.bias"],
    ]
    assert [(group["wd_mult"], group["lr_mult"]) for group in groups] == [(0.0, 1.0), (1.0, 1.0), (1.0, 0.1)]


@pytest.mark.parametrize(("decoupled_min_lr", "min_lr"), [(None, 1e-5), (0.0, 0.0), (1e-4, 1e-4)])
def test_decoupled_rate(decoupled_min_lr: float | None, min_lr: float) -> None:
    toy = Toy()
    rates = {**RATES, "decoupled_lr": 5e-3, "decoupled_min_lr": decoupled_min_lr}
    groups = _get_param_groups([toy], None, None, 1.0, **rates)
    assert names(toy, groups)[1:] == [["embedding.weight"], ["linear.weight"]]
    assert groups[1]["is_decoupled_lr"]
    assert (groups[1]["max_lr"], groups[1]["min_lr"]) == (5e-3, min_lr)
    assert (groups[2]["max_lr"], groups[2]["min_lr"]) == (1e-3, 1e-5)


def test_chunks_share_groups_and_tied_parameters_appear_once() -> None:
    first, second = Toy(), Toy()
    first.linear.weight = first.embedding.weight
    groups = _get_param_groups([first, second], None, None, 1.0, **RATES)
    assert [len(group["params"]) for group in groups] == [6, 3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "adamw"}, ["'adamw'", "adam, sgd"]),
        ({"fp16": True, "bf16": True}, ["exclude each other"]),
        ({"lr": 1e-4, "min_lr": 1e-3}, ["min_lr 0.001 is above lr 0.0001"]),
        ({"clip_grad": -1.0}, ["0 switches clipping off"]),
        ({"loss_scale": 0.0}, ["positive"]),
        ({"exp_avg_dtype": torch.bfloat16}, ["exp_avg_dtype", "use_precision_aware_optimizer"]),
        (
            {"use_precision_aware_optimizer": True, "optimizer": "sgd"},
            ["adam", "use_distributed_optimizer"],
        ),
        ({"clip_grad": -1.0, "optimizer": "x"}, ["'x'", "clip_grad"]),
    ],
)
def test_settings_that_cannot_work(settings: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(**settings)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (
            {"use_distributed_optimizer": True, "use_precision_aware_optimizer": True},
            "use_precision_aware_optimizer",
        ),
        ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload"),
        (
            {"overlap_param_gather_with_optimizer_step": True},
            "overlap_param_gather_with_optimizer_step",
        ),
    ],
)
def test_what_is_not_built_says_so(settings: dict, field: str) -> None:
    with pytest.raises(NotBuiltYetError, match=field):
        get_megatron_optimizer(OptimizerConfig(lr=1e-3, **settings), [Toy()])


def test_a_model_that_cannot_learn_is_refused() -> None:
    with pytest.raises(ConfigError, match="requires a gradient"):
        get_megatron_optimizer(OptimizerConfig(lr=1e-3), [Toy().requires_grad_(False)])


def test_defaults_are_the_original_ones() -> None:
    assert problems_in("megatron.core.optimizer") == []
