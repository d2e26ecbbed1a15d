"""AdamW against torch's own and against its formula in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron.core import overrides
from megatron.core.optimizer import Adam, adamw

HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(7, 5), (64,), (3, 4, 5), (1,)]


def make_params(seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def make_gradients(steps: int, seed: int = 1) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(steps)]


def train(optimizer: torch.optim.Optimizer, gradients: list[list[Tensor]]) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in gradients:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return [param.detach() for param in params]


def reference(param: Tensor, gradients: list[Tensor]) -> Tensor:
    """The formula, in float64."""
    value, lr, (beta1, beta2) = param.detach().double(), HYPER["lr"], HYPER["betas"]
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    for step, gradient in enumerate((g.double() for g in gradients), start=1):
        value = value * (1 - lr * HYPER["weight_decay"])
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        denominator = (square / (1 - beta2**step)).sqrt() + HYPER["eps"]
        value = value - lr * mean / (1 - beta1**step) / denominator
    return value


@pytest.fixture(params=["fused", "foreach"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to make the update, also where the device would take the other."""
    monkeypatch.setattr(adamw, "_has_fused_kernel", lambda device: request.param == "fused")
    return request.param


def test_equals_torch_over_20_steps(kernel: str) -> None:
    gradients = make_gradients(20)
    ours = train(Adam(make_params(), **HYPER), gradients)
    theirs = train(torch.optim.AdamW(make_params(), **HYPER, foreach=False, fused=False), gradients)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)


def test_equals_the_formula_in_float64(kernel: str) -> None:
    gradients = make_gradients(20)
    ours = train(Adam(make_params(), **HYPER), gradients)
    for i, (our, start) in enumerate(zip(ours, make_params(), strict=True)):
        expected = reference(start, [step[i] for step in gradients])
        torch.testing.assert_close(our.double(), expected, rtol=3e-6, atol=1e-6)


def test_gradients_are_left_as_they_are(kernel: str) -> None:
    params, gradients = make_params(), make_gradients(1)[0]
    optimizer = Adam(params, **HYPER)
    train(optimizer, [gradients])
    for param, gradient in zip(params, gradients, strict=True):
        assert torch.equal(param.grad, gradient)


def test_state_is_torchs(kernel: str) -> None:
    gradients = make_gradients(3)
    ours, theirs = Adam(make_params(), **HYPER), torch.optim.AdamW(make_params(), **HYPER)
    train(ours, gradients)
    train(theirs, gradients)
    our_state, their_state = ours.state_dict(), theirs.state_dict()
    assert our_state["param_groups"] == their_state["param_groups"]
    for number, entry in their_state["state"].items():
        assert list(our_state["state"][number]) == list(entry)
        for key, value in entry.items():
            torch.testing.assert_close(our_state["state"][number][key], value, rtol=1e-5, atol=1e-8)
    theirs.load_state_dict(our_state)


def test_parameters_without_gradient_wait(kernel: str) -> None:
    params, gradients = make_params(), make_gradients(4)
    optimizer = Adam(params, **HYPER)
    for number, step in enumerate(gradients):
        params[0].grad = step[0].clone()
        params[1].grad = step[1].clone() if number % 2 else None
        optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 4
    assert optimizer.state[params[1]]["step"].item() == 2
    assert params[2] not in optimizer.state
    expected = reference(make_params()[1], [gradients[1][1], gradients[3][1]])
    torch.testing.assert_close(params[1].detach().double(), expected, rtol=3e-6, atol=1e-6)


def test_closure_is_called_with_gradients_on() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = Adam([param], **HYPER)

    def closure() -> Tensor:
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert (param < 1.0).all()


def test_the_fused_kernel_is_found_on_a_cpu() -> None:
    assert adamw._has_fused_kernel(torch.device("cpu"))


@pytest.mark.parametrize(
    "path",
    [
        "optimizer.adamw.adamw_step",
        "fusions.multi_tensor.unscale_and_check",
        "fusions.multi_tensor.l2_norm",
        "fusions.multi_tensor.scale_gradients",
        "fusions.multi_tensor.count_zeros",
    ],
)
def test_a_device_can_replace_the_arithmetic(path: str) -> None:
    def other(params: list[Tensor]) -> None:
        """Another signature."""

    register: Callable = overrides.override(f"megatron.core.{path}")
    with pytest.raises(overrides.OverrideError, match="cannot replace"):
        register(other)
