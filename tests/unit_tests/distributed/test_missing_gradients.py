"""Gradients that never arrive, or arrive when they must not: told, or harmless, and never lost in silence."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.errors import UsageError
from megatron.core.tensor_parallel import deferred_gradients
from megatron.core.tensor_parallel.linear import linear_with_grad_accumulation_and_async_allreduce
from tests.distributed.pool import run_ranks
from tests.unit_tests.distributed.small_training import make_config

WIDTH = 4


class Forked(torch.nn.Module):
    """Three layers, of which forward uses those it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, used: tuple[int, ...]) -> torch.Tensor:
        for number in used:
            x = self.layers[number](x)
        return x


def wrap(overlap: bool, module: torch.nn.Module | None = None, **settings: Any) -> DistributedDataParallel:
    from megatron.core import parallel_state

    if dist.is_initialized() and not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=overlap, **settings)
    return DistributedDataParallel(make_config(), ddp_config, Forked() if module is None else module)


def one_by_one(overlap: bool, sharded: bool) -> None:
    """The group of all parameters, told of them one at a time; rank r's gradients are r + 1."""
    model = wrap(overlap, use_distributed_optimizer=sharded)
    (group,), (buffer,) = model.bucket_groups, model.buffers
    params = list(model.parameters())
    own = dist.get_rank() + 1.0
    for number, param in enumerate(params):
        buffer.grad_data.fill_(own)
        is_last = number == len(params) - 1
        with contextlib.nullcontext() if overlap else pytest.raises(UsageError, match="behind backward"):
            group.register_grad_ready(param)
        fails = overlap and not is_last
        with pytest.raises(UsageError, match="has arrived") if fails else contextlib.nullcontext():
            group.finish_grad_sync()
        # Of a shard only this rank's part is reduced.
        expected = own if fails else (1.0 + 2.0) / 2
        begin = dist.get_rank() * (buffer.numel // 2) if sharded else 0
        assert buffer.grad_data[begin] == expected
    with pytest.raises(UsageError, match="not of this bucket group" if overlap else "behind backward"):
        group.register_grad_ready(torch.nn.Parameter(torch.zeros(2)))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_reduction_behind_backward_waits_for_every_gradient(overlap: bool, sharded: bool) -> None:
    run_ranks(2, one_by_one, overlap, sharded)


@pytest.mark.parametrize("bucket_size", [None, 1])
def test_a_layer_that_no_loss_reaches_is_named(bucket_size: int | None) -> None:
    model = wrap(True, bucket_size=bucket_size)
    model(torch.ones(1, WIDTH), (0, 2)).sum().backward()
    with pytest.raises(UsageError) as caught:
        model.finish_grad_sync()
    named = [name for name, _ in model.module.named_parameters() if name in str(caught.value)]
    assert named == ["layers.1.weight", "layers.1.bias"]
    assert "2 trainable parameters" in str(caught.value)
    # The missing ones may still come: nothing has been forgotten.
    model(torch.ones(1, WIDTH), (1,)).sum().backward()
    model.finish_grad_sync()


def test_a_layer_without_loss_is_harmless_where_it_cannot_be_overlooked() -> None:
    plain = wrap(False)
    plain(torch.ones(1, WIDTH), (0, 2)).sum().backward()
    plain.finish_grad_sync()
    assert not plain.module.layers[1].weight.main_grad.any()
    frozen = Forked()
    frozen.layers[1].requires_grad_(False)
    model = wrap(True, frozen)
    model(torch.ones(1, WIDTH), (0, 1, 2)).sum().backward()
    model.finish_grad_sync()
    assert frozen.layers[0].weight.main_grad.any()
    # A schedule that starts the reduction by a call knows what it does.
    called = wrap(True)
    called(torch.ones(1, WIDTH), (0, 2)).sum().backward()
    called.start_grad_sync()
    called.start_grad_sync()
    called.finish_grad_sync()


def test_a_layer_frozen_after_wrapping_is_named() -> None:
    model = wrap(True)
    model.module.layers[0].weight.requires_grad_(False)
    model(torch.ones(1, WIDTH), (0, 1, 2)).sum().backward()
    with pytest.raises(UsageError, match=r"1 trainable parameters \(layers\.0\.weight\)"):
        model.finish_grad_sync()


@pytest.mark.parametrize("held_back", [False, True])
def test_a_gradient_behind_a_started_reduction_is_an_error(held_back: bool) -> None:
    model = wrap(True)
    model(torch.ones(1, WIDTH), (0, 1, 2)).sum().backward()
    context = model.no_sync() if held_back else contextlib.nullcontext()
    with context, pytest.raises(UsageError, match="arrived twice"):
        model(torch.ones(1, WIDTH), (0, 1, 2)).sum().backward()
    model.zero_grad_buffer()
    with model.no_sync():
        model(torch.ones(1, WIDTH), (0, 1)).sum().backward()
    model(torch.ones(1, WIDTH), (0, 1, 2)).sum().backward()
    model.finish_grad_sync()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_weight_gradient_that_a_schedule_puts_off(overlap: bool) -> None:
    module = torch.nn.Linear(WIDTH, 2, bias=False)
    model = wrap(overlap, module)
    x = torch.arange(WIDTH * 3.0).view(3, WIDTH)
    with deferred_gradients.deferring():
        linear_with_grad_accumulation_and_async_allreduce(
            x.requires_grad_(), module.weight, None, False, False, False
        ).sum().backward()
    if overlap:
        with pytest.raises(UsageError, match="has arrived"):
            model.finish_grad_sync()
    deferred_gradients.run(deferred_gradients.pending())
    model.finish_grad_sync()
    torch.testing.assert_close(module.weight.main_grad, x.detach().sum(0).expand(2, -1))


def test_a_model_without_trainable_parameters_is_wrapped() -> None:
    model = wrap(True, torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False))
    assert model.buffers == [] and model.bucket_groups == []
    model.zero_grad_buffer()
    model.start_grad_sync()
    model.finish_grad_sync()
    model.scale_gradients(2.0)
    model.broadcast_params()
