"""Optimizers as scripts of one's own make them: without a rate, without a wrapper, with frozen parts."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.errors import ConfigError, UsageError
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.distributed.pool import run_ranks

WIDTH, STEPS = 4, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Net(torch.nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        for param in self.parameters():
            # Values that half precision holds, so that all precisions start alike
            param.data = (torch.randint(-8, 8, param.shape, generator=generator) / 8).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.frozen(self.first(x)))).float().square().mean()


def data(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(10 + step)).to(dtype)


def wrap(net: Net, **ddp: Any) -> DistributedDataParallel:
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    return DistributedDataParallel(config, DistributedDataParallelConfig(**ddp), net)


FORMS = {
    "bare": lambda net: net,
    "list": lambda net: [net],
    "module list": lambda net: torch.nn.ModuleList([net]),
    "wrapped": lambda net: [wrap(net)],
    "sharded": lambda net: [wrap(net, use_distributed_optimizer=True)],
}


def is_second(name: str, param: torch.nn.Parameter) -> bool:
    return "second" in name


def scheduler_for(optimizer: Any) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=0.1,
        min_lr=0.01,
        lr_warmup_steps=2,
        lr_decay_steps=8,
        lr_decay_style="linear",
        start_wd=0.3,
        end_wd=0.3,
        wd_incr_steps=8,
        wd_incr_style="constant",
    )


# What the schedule above says after 0, 1, 2, 3 samples: 0.1 n / 2, then down to 0.01 at 8.
RATES = [0.0, 0.05, 0.1, 0.01 + (1 - 1 / 6) * 0.09]


def reference(kind: str, clip: float, no_decay: bool, lr_mult: float) -> dict[str, torch.Tensor]:
    """torch alone, in float64: only weights decay, unless nothing does; ``second`` learns slower."""
    net = Net().double()
    groups = [
        {
            "params": [param],
            "weight_decay": 0.0 if no_decay or name.endswith("bias") else 0.3,
            "mult": lr_mult if is_second(name, param) else 1.0,
        }
        for name, param in net.named_parameters()
        if param.requires_grad
    ]
    if kind == "adam":
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.5)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step] * group["mult"]
        optimizer.zero_grad()
        net(data(step, torch.float64)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return {name: param.detach() for name, param in net.named_parameters()}


def train(form: str, precision: str, settings: dict[str, Any], **conditions: Any) -> Net:
    net = Net(DTYPES[precision])
    chunks = FORMS[form](net)
    config = OptimizerConfig(
        adam_beta2=0.95,
        adam_eps=1e-4,
        sgd_momentum=0.5,
        fp16=precision == "fp16",
        bf16=precision == "bf16",
        use_distributed_optimizer=form == "sharded",
        **settings,
    )
    assert config.lr is None and config.min_lr is None
    optimizer = get_megatron_optimizer(config, chunks, **conditions)
    schedule = scheduler_for(optimizer)
    model = chunks[0] if form in ("wrapped", "sharded") else net
    for step in range(STEPS):
        optimizer.zero_grad()
        if model is not net:
            model.zero_grad_buffer()
        optimizer.scale_loss(model(data(step, DTYPES[precision]))).backward()
        if model is not net:
            model.finish_grad_sync()
        success, norm, zeros = optimizer.step()
        assert success and norm > 0
        assert (zeros is not None) == config.log_num_zeros_in_grad
        schedule.step(1)
    return net


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_schedule_gives_the_rates(form: str, kind: str) -> None:
    for clip, no_decay, lr_mult in itertools.product((0.0, 0.2), (False, True), (1.0, 0.1)):
        settings = {"optimizer": kind, "clip_grad": clip, "log_num_zeros_in_grad": no_decay}
        net = train(
            form,
            "fp32",
            settings,
            no_weight_decay_cond=(lambda name, param: True) if no_decay else None,
            scale_lr_cond=is_second,
            lr_mult=lr_mult,
        )
        for name, expected in reference(kind, clip, no_decay, lr_mult).items():
            found = dict(net.named_parameters())[name].double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("precision", "scale"),
    [("bf16", {}), ("fp16", {"loss_scale": 64.0}), ("fp16", {"initial_loss_scale": 64.0})],
)
@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form: str, precision: str, scale: dict[str, float]) -> None:
    net = train(form, precision, scale)
    tolerance = 0.05 if precision == "bf16" else 0.01
    for name, expected in reference("adam", 1.0, False, 1.0).items():
        found = dict(net.named_parameters())[name].double()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_without_any_rate_says_so_and_changes_nothing(precision: str) -> None:
    net = Net(DTYPES[precision])
    before = {name: param.clone() for name, param in net.named_parameters()}
    optimizer = get_megatron_optimizer(OptimizerConfig(bf16=precision == "bf16"), [net])
    net(data(0, DTYPES[precision])).backward()
    for step in (optimizer.step, optimizer.step_with_ready_grads):
        with pytest.raises(UsageError, match="no learning rate"):
            step()
    assert all(torch.equal(before[name], param) for name, param in net.named_parameters())
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    assert optimizer.step()[0]
    assert not torch.equal(before["first.weight"], net.first.weight)


def test_the_distributed_optimizer_needs_its_buffers() -> None:
    config = OptimizerConfig(lr=0.1, use_distributed_optimizer=True)
    for chunks in (Net(), [Net()], [wrap(Net())]):
        with pytest.raises(ConfigError, match="not wrapped for it"):
            get_megatron_optimizer(config, chunks)


def frozen_stage(precision: str, sharded: bool) -> tuple[bool, float, list[float]]:
    """Two stages, the first of which has nothing to learn."""
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    net = Net(DTYPES[precision])
    if parallel_state.get_pipeline_model_parallel_rank() == 0:
        net.requires_grad_(False)
    model = wrap(net, use_distributed_optimizer=sharded)
    config = OptimizerConfig(
        lr=0.1,
        use_distributed_optimizer=sharded,
        fp16=precision == "fp16",
        initial_loss_scale=4.0,
        log_num_zeros_in_grad=True,
    )
    optimizer = get_megatron_optimizer(config, [model])
    scheduler_for(optimizer)
    for param in net.parameters():
        if param.requires_grad:
            param.main_grad.fill_(3.0 * optimizer.get_loss_scale().item())
    model.start_grad_sync()
    model.finish_grad_sync()
    success, norm, zeros = optimizer.step()
    optimizer.zero_grad()
    optimizer.reload_model_params()
    optimizer.load_state_dict(optimizer.state_dict())
    return success, norm, [zeros, dist.get_rank()]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stage_without_trainable_parameters_takes_part(precision: str, sharded: bool) -> None:
    elements = sum(param.numel() for param in Net().parameters() if param.requires_grad)
    for rank, (success, norm, others) in enumerate(run_ranks(2, frozen_stage, precision, sharded)):
        assert success
        assert norm == pytest.approx(3.0 * elements**0.5, rel=1e-5)
        assert others == [0.0, rank]
