"""Overflow where the chip saturates: no gradient ever shows it, only the device's flag does."""

import pytest
import torch

import megatron_npu
from megatron.core import overrides
from megatron.core.fusions.multi_tensor import unscale_and_check
from megatron.core.optimizer.adamw import Adam
from megatron.core.optimizer.grad_scaler import DynamicGradScaler
from megatron.core.optimizer.mixed_precision import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron_npu import activation, chip
from megatron_npu.registry import replacements
from megatron_npu.virtual.kernels.optimizer import OverflowFlag
from tests.npu.cpu_kernels import install_on_cpu

install_on_cpu()
megatron_npu.activate()


@pytest.fixture(autouse=True)
def lowered():
    OverflowFlag.raised = False
    yield
    OverflowFlag.raised = False


def optimizer() -> tuple[torch.nn.Parameter, Float16OptimizerWithFloat16Params]:
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    config = OptimizerConfig(fp16=True, lr=0.1, clip_grad=0.0)
    scaler = DynamicGradScaler(
        initial_scale=1024.0,
        min_scale=1.0,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=1000,
        hysteresis=1,
    )
    return param, Float16OptimizerWithFloat16Params(Adam([param], lr=0.1), config, scaler, lambda *_: None)


def test_the_stub_was_told_a_saturating_chip() -> None:
    assert chip.saturates() and chip.is_first_generation()
    assert {row.point.rpartition(".")[2] for row in activation.table() if row.active} == {
        "rms_norm", "rotary", "scaled_masked_softmax", "bias_gelu_impl", "gelu", "adamw_step",
        "watch_overflow", "unscale_and_check",
    }  # fmt: skip


def test_rotary_on_the_first_generation_takes_halves_of_128_channels_only() -> None:
    replacement = replacements()["megatron.core.fusions.embeddings.rotary"]

    def why_not(width: int, interleaved: bool) -> str | None:
        t, table = torch.zeros(3, 2, 4, width), torch.zeros(3, 1, 1, width)
        return replacement.why_not_now((t, table, table, interleaved), {})

    assert why_not(128, False) is None
    assert "first-generation" in why_not(64, False) and "first-generation" in why_not(128, True)


def test_a_saturated_gradient_is_found_and_the_step_skipped() -> None:
    param, step = optimizer()
    step.zero_grad()
    param.grad = torch.full_like(param, 65504.0)  # what such a chip writes where others have Inf
    OverflowFlag.raised = True
    success, _, _ = step.step()
    assert not success
    assert torch.equal(param.data, torch.ones_like(param))
    assert step.get_loss_scale().item() == 512.0


def test_the_default_would_have_missed_it() -> None:
    saturated = [torch.full((4,), 65504.0)]
    default = overrides.default_of("megatron.core.fusions.multi_tensor.unscale_and_check")
    OverflowFlag.raised = True
    assert default([t.clone() for t in saturated], torch.ones(1)).item() == 0.0
    assert unscale_and_check(saturated, torch.ones(1)).item() == 1.0


def test_overflow_before_the_step_does_not_count() -> None:
    param, step = optimizer()
    OverflowFlag.raised = True  # evaluation, or the update before
    step.zero_grad()
    param.grad = torch.full_like(param, 1024.0)
    success, _, _ = step.step()
    assert success
    assert param.data.float().mean() < 1.0


def test_gradients_are_unscaled() -> None:
    grads = [torch.full((3,), 8.0), torch.full((2, 2), -4.0)]
    found = unscale_and_check(grads, torch.tensor([0.25]))
    assert found.shape == (1,) and found.item() == 0.0
    assert [t.flatten()[0].item() for t in grads] == [2.0, -1.0]
