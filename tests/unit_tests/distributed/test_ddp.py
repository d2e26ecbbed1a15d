"""The gradient wrapper on one process."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    buffer_building,
    distributed_data_parallel,
    finalize_model_grads,
)
from megatron.core.errors import ConfigError, NotBuiltYetError, TrainingError
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.core.timers import Timers
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class Operators(TorchDispatchMode):
    """Names of the operators that reach the device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name().split(".")[0])
        return function(*args, **(kwargs or {}))


class Toy(MegatronModule):
    """A model with a tied parameter, a frozen one and one that no loss reaches."""

    def __init__(self, config: TransformerConfig, dtype: torch.dtype) -> None:
        super().__init__(config)
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Linear(4, 4)
        self.norm = torch.nn.LayerNorm(4)
        self.tied = torch.nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.frozen = torch.nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.unused = torch.nn.Parameter(torch.zeros(3))
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.tied(self.norm(self.first(x)).relu()))


def make_config() -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)


def make(dtype: torch.dtype = torch.float32, **settings: bool) -> DistributedDataParallel:
    config = make_config()
    return DistributedDataParallel(config, DistributedDataParallelConfig(**settings), Toy(config, dtype))


def inputs(step: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(step)).to(dtype)


def expected_sum(dtype: torch.dtype, steps: range) -> dict[str, Tensor]:
    """Gradients of the bare model, micro-batch by micro-batch in its own type, added up in float64."""
    toy, total = Toy(make_config(), dtype), {}
    for step in steps:
        toy.zero_grad()
        toy(inputs(step, dtype)).sum().backward()
        for name, param in toy.named_parameters():
            if param.grad is not None:
                total[name] = total.get(name, 0.0) + param.grad.double()
    return total


@pytest.fixture(params=[(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def types(request: pytest.FixtureRequest) -> tuple[torch.dtype, bool]:
    """(type of the parameters, gradients in fp32)."""
    return request.param


def test_micro_batches_add_up(types: tuple[torch.dtype, bool]) -> None:
    dtype, in_fp32 = types
    model = make(dtype, grad_reduce_in_fp32=in_fp32)
    grad_dtype = torch.float32 if in_fp32 else dtype
    for _ in range(2):  # the second step starts from zero again
        model.zero_grad_buffer()
        for step in range(3):
            model(inputs(step, dtype)).sum().backward()
            assert all(param.grad is None for param in model.parameters())
        model.finish_grad_sync()
    expected = expected_sum(dtype, range(3))
    tolerance = 1e-6 if grad_dtype == torch.float32 else 2e-2
    for name, param in model.module.named_parameters():
        if not param.requires_grad:
            assert not hasattr(param, "main_grad")
            continue
        assert param.main_grad.dtype == grad_dtype
        if name == "unused":
            assert not param.main_grad.any()
            continue
        torch.testing.assert_close(param.main_grad.double(), expected[name], rtol=tolerance, atol=tolerance)


def test_gradients_are_contiguous_in_reverse_order() -> None:
    model = make()
    (buffer,) = model.buffers
    trainable = [param for param in model.module.parameters() if param.requires_grad]
    assert buffer.params == trainable[::-1]
    assert buffer.grad_data.shape == (sum(param.numel() for param in trainable),)
    offset = 0
    for param in reversed(trainable):
        assert buffer.param_index_map[param] == (offset, offset + param.numel(), 0)
        assert param.main_grad.data_ptr() == buffer.grad_data[offset:].data_ptr()
        assert param.main_grad.shape == param.shape
        offset += param.numel()


def test_a_buffer_per_pair_of_types() -> None:
    config = make_config()
    toy = Toy(config, torch.bfloat16)
    toy.norm.float()
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), toy)
    assert [(b.param_dtype, b.grad_dtype, b.numel) for b in model.buffers] == [
        (torch.bfloat16, torch.bfloat16, 3 + 16 + 4),
        (torch.float32, torch.float32, 8),
    ]
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), toy)
    assert [(b.param_dtype, b.grad_dtype) for b in model.buffers] == [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
    ]


def test_a_layer_may_add_its_gradient_itself() -> None:
    model = make()
    weight, bias = model.module.first.weight, model.module.first.bias
    model.zero_grad_buffer()
    weight.main_grad.fill_(5.0)
    weight.grad_added_to_main_grad = True
    model(inputs(0, torch.float32)).sum().backward()
    assert weight.main_grad.eq(5.0).all()
    assert weight.grad is None
    assert bias.main_grad.any()
    # Another use of the same weight went through autograd.
    weight.zero_out_wgrad = True
    model(inputs(0, torch.float32)).sum().backward()
    torch.testing.assert_close(
        weight.main_grad.double() - 5.0,
        expected_sum(torch.float32, range(1))["first.weight"],
        rtol=1e-5,
        atol=1e-5,
    )
    model.zero_grad_buffer()
    assert not weight.grad_added_to_main_grad
    assert not weight.main_grad.any()


def test_long_gradients_of_another_type_are_added_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed_data_parallel, "_ADDITION_PIECE", 7)
    main_grad = torch.arange(30.0).view(5, 6)
    grad = torch.full((6, 5), 0.5, dtype=torch.bfloat16).t()
    distributed_data_parallel._accumulate(main_grad, grad)
    assert torch.equal(main_grad, torch.arange(30.0).view(5, 6) + 0.5)


def test_elsewhere_than_on_a_cpu_an_addition_is_one_launch() -> None:
    main_grad = torch.empty(3 * distributed_data_parallel._ADDITION_PIECE, device="meta")
    grad = torch.empty_like(main_grad, dtype=torch.bfloat16)
    with Operators() as operators:
        distributed_data_parallel._accumulate(main_grad, grad)
    assert operators.names == ["aten::add_"]


def test_state_passes_through_without_prefix() -> None:
    model = make()
    state = model.state_dict()
    assert list(state) == list(model.module.state_dict())
    assert list(model.state_dict_for_save_checkpoint(prefix="a.")) == [f"a.{name}" for name in state]
    zeroed = {name: torch.zeros_like(value) for name, value in state.items()}
    model.load_state_dict(zeroed)
    assert not any(param.any() for param in model.module.parameters())


def test_no_sync_marks_all_but_the_last_micro_batch() -> None:
    model = make()
    assert model.is_last_microbatch
    with model.no_sync():
        assert not model.is_last_microbatch
        model(inputs(0, torch.float32)).sum().backward()
    assert model.is_last_microbatch
    assert model.module.first.weight.main_grad.any()


def test_scale_gradients() -> None:
    model = make()
    model.buffers[0].grad_data.fill_(3.0)
    model.scale_gradients(0.5)
    model.scale_gradients(torch.tensor(4.0))
    assert model.module.unused.main_grad.tolist() == [6.0, 6.0, 6.0]


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (-float("inf"), "Inf")])
@pytest.mark.parametrize("start_early", [False, True])
def test_bad_gradients_stop_the_run(bad: float, word: str, start_early: bool) -> None:
    destroy_rerun_state_machine()
    model = make(check_for_nan_in_grad=True)
    model.module.norm.bias.main_grad[2] = bad
    with pytest.raises(
        TrainingError, match=rf"Unexpected result -?\w+ \(message='found {word} in .*gradients"
    ):
        if start_early:
            model.start_grad_sync()
        model.finish_grad_sync()
    tolerant = make()
    tolerant.module.norm.bias.main_grad[2] = bad
    tolerant.finish_grad_sync()


def test_gradients_are_checked_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(check_for_nan_in_grad=True)
    checks = []
    monkeypatch.setattr(model.bucket_groups[0], "check_grads", lambda *which: checks.append(which))
    for _ in range(2):
        model.zero_grad_buffer()
        model.start_grad_sync()
        model.finish_grad_sync()
        model.finish_grad_sync()  # of a step that nobody started early
    assert checks == [(True, False)] * 4


def test_large_gradients_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    destroy_rerun_state_machine()
    model = make(check_for_large_grads=True)
    for step in range(101):
        model.buffers[0].grad_data.fill_(1.0 if step < 100 else 10.5)
        assert not caplog.messages
        model.finish_grad_sync()
    assert "found unexpectedly large value" in caplog.messages[0]
    destroy_rerun_state_machine()


@pytest.mark.parametrize("tokens", [4, 0])
def test_finalize_averages_over_tokens(tokens: int) -> None:
    model = make()
    model.config.timers = timers = Timers(1, "max")
    model.buffers[0].grad_data.fill_(8.0 if tokens else 0.0)
    finalize_model_grads([model], torch.tensor([tokens]))
    assert model.module.unused.main_grad.tolist() == [2.0 if tokens else 0.0] * 3
    assert "all-grads-sync" in timers.get_all_timers_string()
    finalize_model_grads([model])
    assert model.module.unused.main_grad.tolist() == [2.0 if tokens else 0.0] * 3


@pytest.mark.parametrize(
    ("settings", "error", "word"),
    [
        ({"fp8_param_gather": True}, NotBuiltYetError, "fp8_param_gather"),
        ({"use_custom_fsdp": True}, NotBuiltYetError, "use_custom_fsdp"),
        ({"num_distributed_optimizer_instances": 2}, NotBuiltYetError, "num_distributed_optimizer_instances"),
        ({"overlap_param_gather": True}, ConfigError, "add use_distributed_optimizer"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, Any], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        make(**settings)


def test_means_over_ranks_and_sums_of_tokens_exclude_each_other() -> None:
    config = make_config()
    config.calculate_per_token_loss = True
    with pytest.raises(ConfigError, match="calculate_per_token_loss"):
        DistributedDataParallel(
            config, DistributedDataParallelConfig(average_in_collective=True), Toy(config, torch.float32)
        )


@pytest.mark.parametrize(
    ("per_token", "in_collective", "factors"),
    [(False, False, (0.125, 0.125)), (False, True, (1.0, 0.25)), (True, False, (1.0, 1.0))],
)
def test_gradients_of_experts_become_means_over_all_ranks(
    per_token: bool, in_collective: bool, factors: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight ranks hold a dense gradient and two an expert's: their sum of two needs the same eighth."""
    monkeypatch.setattr(buffer_building, "group_size", {"dense": 8, "experts": 2}.get)
    config = DistributedDataParallelConfig(average_in_collective=in_collective)
    groups = buffer_building.ReductionGroups("dense", "experts")
    assert buffer_building.gradient_scaling_factors(config, per_token, groups) == factors
