"""Norm, clipping and zero count by hand and in float64."""

import math

import pytest
import torch

from megatron.core import accelerator, parallel_state
from megatron.core.fusions.multi_tensor import l2_norm, unscale_and_check
from megatron.core.optimizer.clip_grads import (
    clip_grad_by_total_norm_fp32,
    count_zeros_fp32,
    counts_once,
    get_grad_norm_fp32,
)


def make_params(*gradients: torch.Tensor) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for param, gradient in zip(params, gradients, strict=True):
        param.grad = gradient.clone()
    return params


@pytest.mark.parametrize("accelerated", [False, True])
def test_norm_by_hand(accelerated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerator, "is_accelerated", lambda: accelerated)
    gradients = [torch.tensor([[3.0, 0.0]]), torch.tensor([-4.0, 12.0])]
    assert get_grad_norm_fp32(gradients) == 13.0
    assert get_grad_norm_fp32(gradients, norm_type=float("inf")) == 12.0
    assert get_grad_norm_fp32(gradients, norm_type=1) == 19.0
    assert get_grad_norm_fp32(gradients[0]) == 3.0


def test_norm_of_nothing() -> None:
    assert get_grad_norm_fp32([]) == 0.0


@pytest.mark.parametrize("sizes", [[3_000_001], [70_000, 5, 65_536, 131_073]])
def test_norm_is_accurate_over_millions_of_values(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=generator) for size in sizes]
    expected = math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in gradients))
    assert get_grad_norm_fp32(gradients) == pytest.approx(expected, rel=1e-6)


def test_norm_of_half_precision_is_computed_in_fp32() -> None:
    gradient = torch.full((4096,), 300.0, dtype=torch.float16)  # its squares overflow fp16
    assert l2_norm([gradient]).item() == pytest.approx(300.0 * 64, rel=1e-6)


@pytest.mark.parametrize(("bad", "check"), [(float("nan"), math.isnan), (float("inf"), math.isinf)])
def test_norm_shows_what_is_not_finite(bad: float, check: object) -> None:
    assert check(get_grad_norm_fp32([torch.tensor([1.0, bad]), torch.ones(3)]))


@pytest.mark.parametrize(
    ("norm", "factor"), [(13.0, 6.5 / (13.0 + 1e-6)), (6.0, 1.0), (6.5, 6.5 / (6.5 + 1e-6))]
)
def test_clip_by_hand(norm: float, factor: float) -> None:
    params = make_params(torch.tensor([3.0, -4.0]), torch.tensor([[12.0]]))
    params.append(torch.nn.Parameter(torch.zeros(1)))  # without a gradient
    clip_grad_by_total_norm_fp32(params, 6.5, norm)
    torch.testing.assert_close(params[0].grad, torch.tensor([3.0, -4.0]) * factor)
    torch.testing.assert_close(params[1].grad, torch.tensor([[12.0]]) * factor)
    assert params[2].grad is None


def test_zeros_by_hand() -> None:
    params = make_params(torch.tensor([0.0, 1.0, -0.0]), torch.zeros(2, 2))
    assert count_zeros_fp32(params, None) == 6.0
    params[1].shared = True
    assert count_zeros_fp32(params, None) == 2.0
    assert count_zeros_fp32([], None) == 0.0


def test_shared_and_replicated_parameters_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, split, tied = make_params(torch.ones(1), torch.ones(1), torch.ones(1))
    split.tensor_model_parallel = True
    tied.shared = True
    assert [counts_once(param) for param in (plain, split, tied)] == [True, True, False]
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    for rank, expected in ((0, [True, True, False]), (1, [False, True, False])):
        monkeypatch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        assert [counts_once(param) for param in (plain, split, tied)] == expected


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf")])
def test_unscale_and_check(bad: float | None) -> None:
    gradients = [torch.full((3, 2), 8.0), torch.arange(5.0)]
    if bad is not None:
        gradients[1][3] = bad
    found_inf = unscale_and_check(gradients, torch.tensor([0.25]))
    assert found_inf.item() == float(bad is not None)
    assert torch.equal(gradients[0], torch.full((3, 2), 2.0))
    assert gradients[1][4] == 1.0


def test_nothing_to_unscale() -> None:
    assert unscale_and_check([], torch.tensor([0.25])).item() == 0.0
