"""Whole optimizer steps in fp32, bf16 and fp16: arithmetic, skipped steps, state."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.errors import CheckpointError, NotBuiltYetError
from megatron.core.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.timers import Timers
from tests.same_bits import assert_same_bits

PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True, "initial_loss_scale": 256.0, "loss_scale_window": 3},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SETTINGS = {"lr": 1e-2, "min_lr": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.95, "clip_grad": 0.5}


class Toy(torch.nn.Module):
    """Two layers and a norm, with main gradients as the wrapper provides them."""

    def __init__(
        self, precision: str = "fp32", grad_dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Linear(5, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.second = torch.nn.Linear(7, 3)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator).to(DTYPES[precision])
            param.main_grad = torch.zeros(param.shape, dtype=grad_dtype)


def set_gradients(toy: Toy, step: int, scale: float = 1.0) -> list[Tensor]:
    """Gradients that depend on the step's number alone; returns them unscaled in float64."""
    generator = torch.Generator().manual_seed(1000 + step)
    unscaled = []
    for param in toy.parameters():
        gradient = torch.randn(param.shape, generator=generator)
        param.main_grad.copy_(gradient * scale)
        unscaled.append(param.main_grad.double() / scale)
    return unscaled


def make(
    precision: str, grad_dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Toy, ChainedOptimizer]:
    toy = Toy(precision, grad_dtype)
    config = OptimizerConfig(**{**SETTINGS, **PRECISIONS[precision], **changes})
    return toy, get_megatron_optimizer(config, [toy])


def run(toy: Toy, optimizer: ChainedOptimizer, steps: range) -> list[tuple[bool, float | None, float | None]]:
    results = []
    for step in steps:
        optimizer.zero_grad()
        set_gradients(toy, step, optimizer.get_loss_scale().item())
        results.append(optimizer.step())
    return results


def reference_run(
    steps: int, settings: dict[str, Any], dtype: torch.dtype
) -> tuple[list[Tensor], list[float]]:
    """AdamW with clipping in float64 on the toy's parameters; returns them and the norms before clipping."""
    toy = Toy()
    values = [param.detach().to(dtype).double() for param in toy.parameters()]
    decays = [0.0 if value.dim() == 1 else settings["weight_decay"] for value in values]
    means, squares = [torch.zeros_like(v) for v in values], [torch.zeros_like(v) for v in values]
    norms, lr, beta1, beta2 = [], settings["lr"], 0.9, settings["adam_beta2"]
    for step in range(steps):
        gradients = set_gradients(toy, step)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        factor = min(1.0, settings["clip_grad"] / (norms[-1] + 1e-6))
        for i, gradient in enumerate(gradients):
            means[i] = beta1 * means[i] + (1 - beta1) * gradient * factor
            squares[i] = beta2 * squares[i] + (1 - beta2) * (gradient * factor) ** 2
            denominator = (squares[i] / (1 - beta2 ** (step + 1))).sqrt() + 1e-8
            values[i] = (
                values[i] * (1 - lr * decays[i]) - lr * means[i] / (1 - beta1 ** (step + 1)) / denominator
            )
    return values, norms


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_state_is_made_before_the_first_step_for_loading_alone(precision: str) -> None:
    toy = Toy(precision)
    config = OptimizerConfig(**{**SETTINGS, **PRECISIONS[precision]})
    optimizer = get_megatron_optimizer(config, [toy])
    member = optimizer.chained_optimizers[0]
    assert member.state_dict()["optimizer"]["state"] == {}
    made = member.state_dict(is_loading=True)["optimizer"]["state"]
    assert len(made) == len(list(toy.parameters()))
    assert all(not moments["exp_avg"].any() for moments in made.values())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_twenty_steps_equal_float64(precision: str) -> None:
    toy, optimizer = make(precision)
    results = run(toy, optimizer, range(20))
    values, norms = reference_run(20, SETTINGS, DTYPES[precision])
    assert [norm for _, norm, _ in results] == pytest.approx(norms, rel=1e-6)
    assert all(success for success, _, _ in results)
    for param, value in zip(toy.parameters(), values, strict=True):
        main = param.main_param if precision != "fp32" else param.detach()
        torch.testing.assert_close(main.double(), value, rtol=1e-5, atol=1e-5)
        assert param.dtype == DTYPES[precision]
        assert torch.equal(param.detach(), main.to(param.dtype))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_gradients_are_stepped_in_fp32(precision: str) -> None:
    """Without accumulation in fp32 the gradients are rounded once, and the rest is the same arithmetic."""
    rounded, rounding_optimizer = make(precision, grad_dtype=DTYPES[precision])
    exact, exact_optimizer = make(precision)
    for step in range(4):
        scale = rounding_optimizer.get_loss_scale().item()
        set_gradients(rounded, step, scale)
        for param, source in zip(exact.parameters(), rounded.parameters(), strict=True):
            param.main_grad.copy_(source.main_grad)
        assert rounding_optimizer.step() == exact_optimizer.step()
    for param, source in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert torch.equal(param.main_param, source.main_param)
        assert source.main_grad.dtype == DTYPES[precision]


def test_sgd_equals_float64() -> None:
    toy, optimizer = make("fp32", optimizer="sgd", sgd_momentum=0.9, clip_grad=0.0)
    run(toy, optimizer, range(10))
    start = Toy()
    values = [param.detach().double() for param in start.parameters()]
    momenta = [torch.zeros_like(value) for value in values]
    for step in range(10):
        for i, gradient in enumerate(set_gradients(start, step)):
            decay = 0.0 if gradient.dim() == 1 else SETTINGS["weight_decay"]
            momenta[i] = 0.9 * momenta[i] + gradient + decay * values[i]
            values[i] = values[i] - SETTINGS["lr"] * momenta[i]
    for param, value in zip(toy.parameters(), values, strict=True):
        torch.testing.assert_close(param.detach().double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("loss_scale", "scales"), [(None, [256.0, 128.0]), (64.0, [64.0, 64.0])])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_skips_the_step(bad: float, loss_scale: float | None, scales: list[float]) -> None:
    toy, optimizer = make("fp16", loss_scale=loss_scale)
    run(toy, optimizer, range(2))
    before = copy.deepcopy((toy.state_dict(), optimizer.state_dict()["optimizer"]))
    mains = [param.main_param.clone() for param in toy.parameters()]
    for scale in scales:  # the first overflow costs a credit, the second halves a dynamic scale
        set_gradients(toy, 2)
        toy.norm.weight.main_grad[3] = bad
        assert optimizer.step() == (False, None, None)
        assert optimizer.get_loss_scale().item() == scale
    after = (toy.state_dict(), optimizer.state_dict()["optimizer"])
    for old, new in zip(before, after, strict=True):
        assert_same_bits(old, new)
    assert all(torch.equal(a, b.main_param) for a, b in zip(mains, toy.parameters(), strict=True))
    assert run(toy, optimizer, range(2, 3))[0][0]


def test_bf16_is_not_scaled() -> None:
    _, optimizer = make("bf16")
    assert optimizer.get_loss_scale().tolist() == [1.0]
    assert "grad_scaler" not in optimizer.state_dict()
    assert make("bf16", loss_scale=8.0)[1].get_loss_scale().tolist() == [8.0]


def test_the_loss_is_scaled() -> None:
    loss = torch.tensor(3.0, requires_grad=True)
    for precision, factor in (("fp32", 1.0), ("bf16", 1.0), ("fp16", 256.0)):
        scaled = make(precision)[1].scale_loss(loss)
        assert scaled.shape == ()
        assert scaled.item() == 3.0 * factor


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_are_counted_on_demand(precision: str) -> None:
    toy, optimizer = make(precision)
    assert run(toy, optimizer, range(1))[0][2] is None
    toy, optimizer = make(precision, log_num_zeros_in_grad=True)
    set_gradients(toy, 0)
    toy.first.weight.main_grad[1:3] = 0.0
    toy.second.weight.shared = True
    toy.second.weight.main_grad.zero_()
    if precision != "fp32":
        toy.second.weight.main_param.shared = True
    assert optimizer.step()[2] == 10.0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_shared_parameters_are_updated_but_not_counted(precision: str) -> None:
    toy = Toy(precision)
    toy.second.weight.shared = True
    config = OptimizerConfig(**{**SETTINGS, **PRECISIONS[precision]})
    optimizer = get_megatron_optimizer(config, [toy])
    gradients = set_gradients(toy, 0, optimizer.get_loss_scale().item())
    counted = [g for g, p in zip(gradients, toy.parameters(), strict=True) if p is not toy.second.weight]
    before = toy.second.weight.detach().clone()
    norm = optimizer.step()[1]
    assert norm == pytest.approx(torch.cat([g.flatten() for g in counted]).norm().item(), rel=1e-6)
    assert not torch.equal(toy.second.weight, before)


def test_a_bare_model_steps_on_param_grad() -> None:
    """Without the wrapper the gradients are autograd's."""
    for precision in PRECISIONS:
        toy, optimizer = make(precision)
        twin, twin_optimizer = make(precision)
        set_gradients(twin, 0)
        for param, source in zip(toy.parameters(), twin.parameters(), strict=True):
            del param.main_grad
            source.main_grad.copy_(source.main_grad.to(param.dtype))
            param.grad = source.main_grad.to(param.dtype, copy=True)
        assert optimizer.step() == twin_optimizer.step()
        assert_same_bits(toy.state_dict(), twin.state_dict())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_released(precision: str) -> None:
    toy, optimizer = make(precision)
    run(toy, optimizer, range(1))
    assert all(param.grad is None for param in toy.parameters())
    toy.first.weight.grad = torch.ones_like(toy.first.weight)
    optimizer.zero_grad()
    assert toy.first.weight.grad is None
    assert all(param.grad is None for param in optimizer.get_parameters())
    toy.first.weight.grad = torch.ones_like(toy.first.weight)
    optimizer.zero_grad(set_to_none=False)
    assert toy.first.weight.grad.eq(0).all()


@pytest.mark.parametrize("stop", [0, 1, 4, 7])
@pytest.mark.parametrize("optimizer_name", ["adam", "sgd"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_stopped_run_goes_on_with_the_same_bits(
    precision: str, optimizer_name: str, stop: int, tmp_path: Any
) -> None:
    toy, optimizer = make(precision, optimizer=optimizer_name)
    run(toy, optimizer, range(stop))
    torch.save({"model": toy.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    rest = run(toy, optimizer, range(stop, 8))

    resumed, resumed_optimizer = make(precision, optimizer=optimizer_name, lr=0.5)
    for param in resumed.parameters():
        param.data.fill_(9.0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    assert run(resumed, resumed_optimizer, range(stop, 8)) == rest
    assert_same_bits(resumed.state_dict(), toy.state_dict())
    assert_same_bits(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_loading_copies() -> None:
    toy, optimizer = make("fp32")
    run(toy, optimizer, range(2))
    other, other_optimizer = make("fp32")
    other_optimizer.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    run(other, other_optimizer, range(2))
    assert_same_bits(optimizer.state_dict(), before)


GROUP_KEYS = [
    "wd_mult",
    "lr_mult",
    "is_expert_parallel",
    "is_decoupled_lr",
    "max_lr",
    "min_lr",
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "amsgrad",
    "maximize",
    "foreach",
    "capturable",
    "differentiable",
    "fused",
    "decoupled_weight_decay",
    "params",
]


def test_state_layout() -> None:
    toy, optimizer = make("fp16")
    run(toy, optimizer, range(1))
    state = optimizer.state_dict()
    assert sorted(state) == ["fp32_from_fp16_params", "grad_scaler", "optimizer"]
    assert sorted(state["grad_scaler"]) == ["growth_tracker", "hysteresis_tracker", "scale"]
    assert [list(group) for group in state["optimizer"]["param_groups"]] == [GROUP_KEYS, GROUP_KEYS]
    assert [group["params"] for group in state["optimizer"]["param_groups"]] == [[0, 1], [2, 3, 4, 5]]
    assert [[list(p.shape) for p in group] for group in state["fp32_from_fp16_params"]] == [
        [[7, 5], [3, 7]],
        [[7], [7], [7], [3]],
    ]
    entry = state["optimizer"]["state"][0]
    assert list(entry) == ["step", "exp_avg", "exp_avg_sq"]
    assert (entry["step"].shape, entry["step"].dtype, entry["step"].item()) == ((), torch.float32, 1.0)
    assert sorted(make("fp32")[1].state_dict()) == ["param_groups", "state"]


def test_state_of_a_fused_optimizer_loads() -> None:
    """Step counts in the groups, none in the parameters' entries."""
    toy, optimizer = make("fp32")
    run(toy, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        del entry["step"]
    for group in state["param_groups"]:
        group.update(step=3, bias_correction=True)
        for key in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
            del group[key]
    _, other = make("fp32")
    other.load_state_dict(state)
    assert_same_bits(other.state_dict(), optimizer.state_dict())


def test_old_names_load() -> None:
    toy, optimizer = make("fp16")
    run(toy, optimizer, range(3))
    state = optimizer.state_dict()
    old = {
        "optimizer_state_dict": state["optimizer"],
        "fp32_from_fp16": state["fp32_from_fp16_params"],
        "grad_scaler": state["grad_scaler"],
    }
    _, other = make("fp16")
    other.load_state_dict(old)
    assert_same_bits(other.state_dict(), state)


def test_hyper_parameters_come_from_the_checkpoint_and_kernels_do_not() -> None:
    _, optimizer = make("fp32")
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group.update(betas=(0.8, 0.9), max_lr=0.25, foreach=True)
        del group["min_lr"]
    _, other = make("fp32")
    other.load_state_dict(state)
    for group in other.param_groups:
        assert (group["betas"], group["max_lr"], group["foreach"]) == ((0.8, 0.9), 0.25, None)
        assert group["min_lr"] == SETTINGS["min_lr"]


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    toy, optimizer = make("bf16")
    run(toy, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    wrong_shape = copy.deepcopy(before)
    wrong_shape["optimizer"]["state"][1]["exp_avg"] = torch.zeros(2, 2)
    wrong_copies = copy.deepcopy(before)
    wrong_copies["fp32_from_fp16_params"][0].pop()
    wrong_groups = copy.deepcopy(before)
    wrong_groups["optimizer"]["param_groups"][1]["params"].pop()
    _, fp32_optimizer = make("fp32")
    for wrong in (wrong_shape, wrong_copies, wrong_groups, fp32_optimizer.state_dict(), {}):
        with pytest.raises(CheckpointError, match="no_load_optim"):
            optimizer.load_state_dict(wrong)
    with pytest.raises(CheckpointError, match="no_load_optim"):
        fp32_optimizer.load_state_dict(before)
    assert_same_bits(optimizer.state_dict(), before)


def test_reload_takes_over_the_models_weights() -> None:
    toy, optimizer = make("bf16")
    for param in toy.parameters():
        param.data.fill_(0.5)
    optimizer.reload_model_params()
    assert all(main.eq(0.5).all() for main in optimizer.get_parameters())


def test_models_of_mixed_types() -> None:
    toy = Toy("bf16")
    toy.norm.weight.data = toy.norm.weight.data.float()
    optimizer = get_megatron_optimizer(OptimizerConfig(**{**SETTINGS, "bf16": True}), [toy])
    before = toy.norm.weight.detach().clone()
    run(toy, optimizer, range(1))
    assert not torch.equal(toy.norm.weight, before)
    assert toy.norm.weight.dtype == torch.float32
    assert any(param is toy.norm.weight for param in optimizer.get_parameters())
    assert [len(group) for group in optimizer.state_dict()["fp32_from_fp16_params"]] == [2, 3]


def test_a_chain_of_two_steps_as_one() -> None:
    """One norm over both members decides on clipping, and an overflow in one skips both."""
    toy, other = Toy("fp16"), Toy("fp16", seed=5)
    config = OptimizerConfig(**{**SETTINGS, **PRECISIONS["fp16"]})
    members = [get_megatron_optimizer(config, [part]).chained_optimizers[0] for part in (toy, other)]
    chain = ChainedOptimizer(members)
    gradients = [g for part in (toy, other) for g in set_gradients(part, 0, 256.0)]
    success, norm, _ = chain.step()
    assert success
    assert norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-6)
    clipped = torch.cat([param.grad.flatten() for param in chain.get_parameters()])
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-5)

    before = [param.clone() for param in chain.get_parameters()]
    for part in (toy, other):
        set_gradients(part, 1, 256.0)
    other.first.bias.main_grad[0] = float("inf")
    assert chain.step() == (False, None, None)
    assert all(torch.equal(a, b) for a, b in zip(before, chain.get_parameters(), strict=True))

    state = chain.state_dict()
    assert isinstance(state, list)
    assert len(chain.param_groups) == 4
    assert len(chain.state) == 12
    copies = [get_megatron_optimizer(config, [Toy("fp16", seed=9)]).chained_optimizers[0] for _ in range(2)]
    for loadable in (state, {0: state[0], 1: state[1]}):
        loaded = ChainedOptimizer(copies)
        loaded.load_state_dict(loadable)
        assert_same_bits(loaded.state_dict(), state)
    with pytest.raises(CheckpointError, match="2 chained optimizers, this run has 1"):
        ChainedOptimizer(copies[:1]).load_state_dict(state)
    with pytest.raises(AttributeError, match="chained_optimizers"):
        _ = chain.optimizer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_optimizer_comes_as_a_chain_of_one_member(precision: str) -> None:
    """As the public interface of core_r0.12 has it, with the state of a single one in checkpoints."""
    toy, optimizer = make(precision)
    assert isinstance(optimizer, ChainedOptimizer)
    (member,) = optimizer.chained_optimizers
    assert not isinstance(member, ChainedOptimizer)
    success, norm, _ = run(toy, optimizer, range(1))[0]
    assert success
    assert norm == pytest.approx(reference_run(1, SETTINGS, DTYPES[precision])[1][0], rel=1e-6)
    params = optimizer.get_parameters()
    assert len(optimizer.state) == len(params) == len(list(toy.parameters()))
    assert all(optimizer.state[0, param] is member.state[param] for param in params)
    keys = {"state", "param_groups"} if precision == "fp32" else {"optimizer", "fp32_from_fp16_params"}
    saved = optimizer.state_dict()
    assert set(saved) - {"grad_scaler"} == keys
    _, resumed = make(precision)
    resumed.chained_optimizers[0].load_state_dict(saved)
    assert_same_bits(resumed.state_dict(), saved)


def test_public_classes() -> None:
    assert isinstance(make("fp32")[1].chained_optimizers[0], FP32Optimizer)
    assert isinstance(make("bf16")[1].chained_optimizers[0], Float16OptimizerWithFloat16Params)
    assert isinstance(make("bf16")[1].optimizer, torch.optim.AdamW)
    with pytest.raises(NotBuiltYetError, match="ckpt_format torch_dist"):
        make("fp32")[1].sharded_state_dict({})


def test_the_parts_of_a_step_are_timed() -> None:
    timers = Timers(1, "max")
    toy, optimizer = make("fp16", timers=timers, log_num_zeros_in_grad=True)
    run(toy, optimizer, range(1))
    report = timers.get_all_timers_string()
    for part in (
        "copy-to-main-grad",
        "unscale-and-check-inf",
        "clip-main-grad",
        "count-zeros",
        "inner-step",
        "copy-main-to-model-params",
    ):
        assert f"optimizer-{part} ." in report
